"""Bundles of TensorRT engines at run time, over a driver and a library that keep the rules of the real ones."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_export.building import engines
from qwen_export.commands.cli import main
from qwen_export.engine_options import EngineOptions
from qwen_export.errors import BundleError, QwenExportError, VerifyError
from qwen_export.manifest import EngineSpec, WeightSpec, load_manifest
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.backends.tensorrt import delta_net_plugin, tensorrt_compatibility
from qwen_export.runtimes.backends.tensorrt.tensorrt_compatibility import runs_on
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.memory import cuda_driver, cuda_memory
from qwen_export.runtimes.memory.mapped_weights import MappedWeights, weight_bytes
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.verification.layer_check import verify_layers
from tests.support.engine_machine import CHUNK, PROMPT, WIDTH, Machine
from tests.support.fake_driver import FakeDriver
from tests.support.fake_tensorrt import FakeTensorRT, TensorLocation, engine_bundle
from tests.support.greedy import greedy
from tests.support.manifests import write_raw

# Engines read and write what the graphs do


def test_engines_give_the_tokens_of_the_graphs(portable: Path, bundle: Path, machine: Machine) -> None:
    driver, _ = machine()
    expected = greedy(load(portable, threads=1).decoder(), PROMPT, 12)
    assert greedy(load(bundle).decoder(), PROMPT, 12) == expected
    assert driver.launches > 8


def test_our_plugins_are_known_before_an_engine_is_read(
    portable: Path, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tensorrt = machine()
    seen: list[int] = []
    monkeypatch.setattr(delta_net_plugin, "register", lambda library: seen.append(tensorrt.live["engine"]))
    load(engine_bundle(portable, tmp_path / "plain"))
    assert not seen
    gc.collect()
    load(engine_bundle(portable, tmp_path / "plugged", plugins=["gated_delta_net"]))
    assert seen == [0]


def test_without_recording_the_tokens_are_the_same(portable: Path, bundle: Path, machine: Machine) -> None:
    driver, _ = machine(library={"recordable": False})
    assert greedy(load(bundle).decoder(), PROMPT, 12) == greedy(load(portable, threads=1).decoder(), PROMPT, 12)
    assert driver.launches == 0


def test_what_was_not_accepted_leaves_no_trace(bundle: Path, machine: Machine) -> None:
    machine()
    plain, drafted = load(bundle).decoder(), load(bundle).decoder()
    expected = greedy(plain, PROMPT, 14)
    tokens = [int(drafted.prefill(PROMPT).argmax())]
    for right in (0, 2, 1, 3):
        draft = expected[len(tokens) : len(tokens) + right]
        wrong = [(expected[len(tokens) + right] + 1) % 90] * (WIDTH - 1 - right)
        logits = drafted.verify([tokens[-1], *draft, *wrong])
        drafted.accept(1 + right)
        tokens += [*draft, int(logits[right].argmax())]
    assert tokens == expected[: len(tokens)]


@pytest.mark.parametrize("speculate", [1, 3, "auto", "lookup"])
def test_drafts_do_not_change_the_text(bundle: Path, machine: Machine, speculate: int | str) -> None:
    machine()
    texts = []
    for way in ("off", speculate):
        model, statistics = load(bundle, speculate=way), Statistics()
        texts.append(list(model.generate(Request(PROMPT * 2, Sampler(SamplingParams(greedy=True)), (), 24), statistics)))
    assert texts[0] == texts[1]


def test_marks_and_snapshots_bring_back_the_same_logits(bundle: Path, machine: Machine) -> None:
    machine()
    decoder, other = load(bundle).decoder(), load(bundle).decoder()
    decoder.prefill(PROMPT)
    mark, snapshot = decoder.mark(), decoder.snapshot()
    first = [decoder.step([token])[0].copy() for token in (5, 6, 7)]
    decoder.rewind(mark)
    again = [decoder.step([token])[0].copy() for token in (5, 6, 7)]
    other.restore(snapshot)
    elsewhere = [other.step([token])[0].copy() for token in (5, 6, 7)]
    for one, two, three in zip(first, again, elsewhere, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


def test_sequences_do_not_touch_each_other(bundle: Path, machine: Machine) -> None:
    machine()
    model = load(bundle)
    alone = [greedy(model.decoder(), PROMPT[start:], 5) for start in (0, 4)]
    both = model.decoder(2)
    tokens = [[int(both.prefill(PROMPT[start:], sequence).argmax())] for sequence, start in enumerate((0, 4))]
    for _ in range(4):
        for row, logits in zip(tokens, both.step([row[-1] for row in tokens]), strict=True):
            row.append(int(logits.argmax()))
    assert tokens == alone


@pytest.mark.parametrize("room", [True, False])
def test_stripped_engines_are_given_their_weights(portable: Path, tmp_path: Path, machine: Machine, room: bool) -> None:
    """From the GPU where there is room for a copy of them, which goes; else from their file."""
    weights = sum({w.offset: weight_bytes(w) for w in load_manifest(portable).graphs["decoder"].weights}.values())
    driver, tensorrt = machine() if room else machine(memory=int(1.5 * weights))
    stripped = engine_bundle(portable, tmp_path / "stripped", weights="stripped")
    expected = greedy(load(portable, threads=1).decoder(), PROMPT, 6)
    model = load(stripped)
    assert sum(driver.allocated.values()) < weights // 4 and (driver.peak > weights) is room
    assert (TensorLocation.HOST in tensorrt.refitted_from) is not room
    assert greedy(model.decoder(), PROMPT, 6) == expected


@pytest.mark.parametrize(("budget", "most"), [(None, 1000), (1 << 40, 1000), (600, 599), (0, 0)])
def test_the_budget_for_weights_is_shared_by_the_engines(
    portable: Path, tmp_path: Path, machine: Machine, budget: int | None, most: int
) -> None:
    _, tensorrt = machine()
    streamed = engine_bundle(portable, tmp_path / "streamed", weights="streamed", options={"weight_streaming": True})
    greedy(load(streamed, weight_budget=budget).decoder(), PROMPT, 2)
    graphs = load_manifest(streamed).graphs
    assert len(tensorrt.budgets) == len(graphs)
    if most < 1000:
        assert most - len(graphs) <= sum(tensorrt.budgets) <= most + 1
    else:
        assert set(tensorrt.budgets) == {most}


def test_a_budget_needs_engines_that_stream(bundle: Path, machine: Machine) -> None:
    machine()
    with pytest.raises(QwenExportError, match=r"cannot wait in host memory.*weight_streaming"):
        load(bundle, weight_budget=1 << 30)
    with pytest.raises(QwenExportError, match="negative"):
        load(bundle, weight_budget=-1)


def test_pages_that_were_uploaded_leave_the_process(tmp_path: Path, bundle: Path) -> None:
    status = Path("/proc/self/smaps")
    if not status.exists():
        pytest.skip("the system does not tell")
    size = 8 << 20
    (bundle / "large").write_bytes(bytes(range(256)) * (size // 256))
    weights, spec = MappedWeights(bundle, load_manifest(bundle)), WeightSpec("large", "large", "uint8", (size - 100,), 100)
    data = weights.bytes(spec)

    def resident() -> int:
        lines = iter(status.read_text().splitlines())
        return next(int(next(line for line in lines if line.startswith("Rss:")).split()[1]) for line in lines if line.endswith("/large"))

    total = int(data.sum(dtype=np.int64))
    assert resident() >= (size >> 10) - 8
    weights.release([spec])
    assert resident() <= 16
    assert int(data.sum(dtype=np.int64)) == total


# What is refused, and how


def refused(bundle: Path, capsys: pytest.CaptureFixture[str], *mentions: str) -> None:
    """load() and `check` refuse the bundle with one sentence that has all of `mentions`."""
    with pytest.raises(QwenExportError) as raised:
        load(bundle)
    with pytest.raises(SystemExit):
        main(["check", str(bundle)])
    for message in (str(raised.value), capsys.readouterr().err.splitlines()[-1]):
        for text in mentions:
            assert text in message, message


def test_check_names_the_gpu(bundle: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine()
    main(["check", str(bundle)])
    assert "tensorrt-rtx 1.5.0.114, CUDA 13.0, Fake GPU (SM 89)" in capsys.readouterr().out


def test_a_machine_without_driver(
    bundle: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine()
    monkeypatch.undo()
    cuda_driver.forget_driver()
    monkeypatch.setattr(cuda_driver, "LIBRARY_NAMES", ("libnothing.so.1",))
    monkeypatch.setattr(tensorrt_compatibility, "load_library", lambda flavour: FakeTensorRT(FakeDriver()).library())
    refused(bundle, capsys, "no NVIDIA driver", "libnothing.so.1", "Install the driver")


def test_a_machine_without_gpu(bundle: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine(devices=0)
    refused(bundle, capsys, "sees no GPU", "nvidia-smi")


def test_a_driver_that_is_too_old(portable: Path, tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine(cuda=12040)
    refused(engine_bundle(portable, tmp_path / "new", minimum_cuda="13.0"), capsys, "CUDA 12.4", "at least CUDA 13.0")


def test_another_gpu(bundle: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine(sm=(12, 0))
    refused(bundle, capsys, "compiled for other GPUs", "SM 120", "SM 89", "qwen-export rebuild")


def test_another_version(bundle: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine(library={"version": "1.7.1.116"})
    refused(bundle, capsys, "another version", "1.7.1.116", "1.5.0.114")


def test_everything_that_does_not_match_is_said_at_once(bundle: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine(library={"version": "1.7.1.116"}, sm=(12, 0))
    refused(
        bundle, capsys, "not for this machine", "1.7.1.116, and they need 1.5.0.114", "Fake GPU, SM 120, and they need SM 89", "rebuild"
    )


def test_a_library_that_is_not_installed(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        import tensorrt_rtx_bindings  # noqa: F401
    except ImportError:
        refused(bundle, capsys, "tensorrt-rtx is not installed", "pip install tensorrt-rtx-cu13-libs")
    else:
        pytest.skip("TensorRT-RTX is installed here")


def test_inspect_says_what_engines_are_for(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the library nor a GPU is asked."""
    main(["inspect", str(bundle)])
    out = " ".join(capsys.readouterr().out.split())
    assert "needs tensorrt-rtx 1.5.0.114, a GPU of SM 89, a driver for CUDA 12.0, engines with bound weights; no graphs to rebuild" in out
    assert "prefill prefill.onnx, " in out and f": {CHUNK} tokens over " in out and "1 token over" in out
    assert f"up to {WIDTH - 1} a round, by its draft head" in out


@pytest.mark.parametrize(
    ("compatibility", "sm", "runs"),
    [("none", "89", True), ("none", "90", False), ("ampere+", "90", True), ("ampere+", "75", False), ("same-sm", "86", False)],
)
def test_how_far_engines_run(compatibility: str, sm: str, runs: bool) -> None:
    assert runs_on(EngineSpec("1.5", ("89",), compatibility), sm) is runs


def test_an_engine_that_the_library_refuses(portable: Path, tmp_path: Path, machine: Machine) -> None:
    machine()
    with pytest.raises(BundleError, match=r"refuses the engine on Fake GPU, SM 8\.9 .*it was not compiled for this GPU.*rebuild"):
        load(engine_bundle(portable, tmp_path / "refused", weights="refused"))


def test_weights_that_do_not_fit(bundle: Path, machine: Machine) -> None:
    driver, _ = machine(memory=10_000)
    with pytest.raises(BundleError, match="weights do not fit the free memory of the GPU"):
        load(bundle)
    gc.collect()
    assert not driver.allocated


def test_check_asks_the_gpu_for_memory(bundle: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine(memory=1 << 20)
    with pytest.raises(SystemExit):
        main(["check", str(bundle)])
    assert "too little free memory" in capsys.readouterr().err


def test_a_device_that_is_no_gpu(bundle: Path, machine: Machine) -> None:
    machine()
    with pytest.raises(BundleError, match="run on an NVIDIA GPU: got cpu"):
        load(bundle, device="cpu")


def test_memory_that_runs_out(machine: Machine) -> None:
    machine(memory=1 << 20)
    with pytest.raises(BundleError, match=r"too little free memory: got 1\.0 MiB free of 1\.0 MiB, expected 4\.0 MiB .*max_context"):
        cuda_memory.allocate(4 << 20)


def test_a_gpu_that_is_not_there(bundle: Path, machine: Machine) -> None:
    machine()
    with pytest.raises(BundleError, match="no such GPU: got device 3, expected 0 to 0"):
        load(bundle, device_id=3)


def test_an_engine_that_is_not_the_manifests(bundle: Path, machine: Machine) -> None:
    machine()
    write_raw(bundle, (bundle / "manifest.json").read_text().replace('"name": "commit"', '"name": "last_slot"'))
    with pytest.raises(BundleError, match="not what the manifest describes: got commit, last_slot"):
        load(bundle)


# ---- layer by layer


def test_layers_of_engines_are_compared_with_the_eager_model(
    portable: Path, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("polygraphy")
    machine()
    compiled = []

    def compile_graph(library: object, graph: str, model: bytes, output: Path, options: EngineOptions, weights: dict[str, Any]) -> None:
        compiled.append((graph, options.weights))
        output.write_bytes(model)

    monkeypatch.setattr(engines, "ready_library", lambda flavour, options: None)
    monkeypatch.setattr(engines, "compile_graph", compile_graph)
    graphs = ["decoder", "verify", "prefill"]
    carrying = engine_bundle(portable, tmp_path / "carrying", onnx=graphs, options={"weights": "bound"})
    result = verify_layers(carrying, portable.parent / "checkpoint")
    assert result["passed"] and sorted(compiled) == sorted((graph, "bound") for graph in graphs)
    assert [row["tokens"] for row in result["layers"][:4]] == [81] * 4


def test_layers_of_engines_need_the_graphs(portable: Path, bundle: Path, machine: Machine) -> None:
    machine()
    with pytest.raises(VerifyError, match=r"does not carry its graphs.*carry_onnx"):
        verify_layers(bundle, portable.parent / "checkpoint")
