"""OpenVINO as a runtime of target `onnx`: the same bundle, the same texts."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.commands.cli import main
from qwen_export.errors import BundleError, ParameterError
from qwen_export.manifest import Manifest, load_manifest
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.backends.compatibility import check_runnable, for_runtime
from qwen_export.runtimes.backends.openvino.openvino_compatibility import check_openvino
from tests.support.source_tree import ROOT
from tests.support.synthesize import synthesize
from tests.test_parity import TOLERANCE, prompt, tiny

needs_openvino = pytest.mark.openvino


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tiny(value_ratio=2, query_ratio=4, tied=True), tmp_path_factory.mktemp("checkpoints") / "tiny", with_mtp=False)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundles") / "fp32"
    return build(checkpoint, output, target="onnx", max_context=128, options=StaticOptions(16, step_tokens=4))


@needs_openvino
def test_prompts_steps_and_verifies_give_the_logits_of_onnx_runtime(bundle: Path) -> None:
    """States that change places and caches that are written in place, across all graphs. Both are within TOLERANCE of transformers."""
    ours, theirs = (load(bundle, threads=1, runtime=name).decoder() for name in ("openvino", "onnxruntime"))
    ids = prompt(80, 3)
    for machine in (ours, theirs):
        machine.prefill(ids[:37])
        machine.verify(ids[37:41])
        machine.accept(2)
        machine.step([ids[39]])
        machine.restore(machine.snapshot())
    for token in ids[40:50]:
        assert np.abs(np.asarray(ours.step([token])) - np.asarray(theirs.step([token]))).max() <= 2 * TOLERANCE
    assert np.abs(np.asarray(ours.prefill(ids[50:])) - np.asarray(theirs.prefill(ids[50:]))).max() <= 2 * TOLERANCE


def demo(directory: Path, precision: str) -> Path:
    return build(
        ROOT / "examples" / "demo-dense", directory / "b", target="onnx", precision=precision, max_context=128, options=StaticOptions(32)
    )


@needs_openvino
def test_a_trained_checkpoint_writes_the_same_text(tmp_path: Path) -> None:
    made, tokens = demo(tmp_path, "fp16"), []
    for runtime in (None, "openvino"):
        with load(made, threads=2, runtime=runtime) as model:
            answer = model.complete("def add(a, b):\n", sampling=SamplingParams(greedy=True), max_new_tokens=24)
            "".join(answer)
            tokens.append(answer.tokens)
    assert tokens[0] == tokens[1]


@needs_openvino
def test_int8_differs_by_the_roundings_of_two_runtimes(tmp_path: Path) -> None:
    """Each rounds what a product of codes reads to 8 bits in its own way, which moves the logits by 1 % of their deviation."""
    made, rows = demo(tmp_path, "int8"), []
    for runtime in (None, "openvino"):
        with load(made, threads=1, runtime=runtime, speculate="off") as model:
            ids, decoder = model.tokenizer.encode('def add(a, b):\n    """Add two numbers."""\n    return a + b\n')[:20], model.decoder()
            rows.append(np.array([decoder.prefill(ids[:12]).copy(), *(decoder.step([token])[0].copy() for token in ids[12:])]))
    assert np.sqrt(((rows[0] - rows[1]) ** 2).mean()) <= 0.03 * rows[0].std()


@needs_openvino
def test_check_names_the_runtime(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(bundle), "--runtime", "openvino"])
    assert "openvino 20" in capsys.readouterr().out


@needs_openvino
def test_a_bundle_with_weights_outside_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    made = build(checkpoint, tmp_path / "b", target="onnx", max_context=64, options=StaticOptions(16), weights="reference")
    with pytest.raises(BundleError, match="weights outside the bundle"):
        load(made, runtime="openvino")


@pytest.fixture
def portable(tiny_bundle: Path) -> Manifest:
    """A manifest of target onnx."""
    manifest = load_manifest(tiny_bundle)
    return replace(manifest, target=replace(manifest.target, name="onnx", device="cpu"), plugins=())


def test_without_openvino_the_message_says_what_to_install(portable: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(BundleError, match=r"OpenVINO is not installed.*\[openvino\]"):
        check_runnable(for_runtime(portable, "openvino"))
    monkeypatch.setattr(metadata, "version", lambda name: "2025.4.1")
    with pytest.raises(BundleError, match=r"older.*2025\.4\.1.*2026\.1"):
        check_openvino(for_runtime(portable, "openvino"))


def test_other_bundles_and_other_runtimes_are_refused(portable: Manifest, tiny_bundle: Path) -> None:
    with pytest.raises(ParameterError, match="does not run on this runtime"):
        load(tiny_bundle, runtime="openvino")
    with pytest.raises(ParameterError, match="not known"):
        for_runtime(portable, "ncnn")
    for same in (None, "onnxruntime"):
        assert for_runtime(portable, same) is portable
