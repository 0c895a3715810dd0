"""Experts that stay in host memory: the same logits wherever they are, as many on the GPU as fit, and a refusal where the CPU is faster.

The GPU is a fake whose memory is that of the host.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.host_experts import expert_weights, with_inputs
from qwen_export.building.lower_graphs import lower
from qwen_export.errors import BundleError, ParameterError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.manifest import load_manifest
from qwen_export.manifest_checks import check
from qwen_export.manifest_parsing import parse
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.memory import memory_rates
from qwen_export.runtimes.memory.mapped_weights import weight_bytes
from qwen_export.verification.logit_check import verify
from tests.support.cuda_sessions import cuda_sessions
from tests.support.fake_driver import FakeDriver
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize

CONTEXT, VOCABULARY = 256, 64
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(vision=False, moe=True, vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1)
    return synthesize(config, tmp_path_factory.mktemp("experts") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return build(checkpoint, checkpoint.parent / "host", precision="int4", host_experts=True, max_context=CONTEXT)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[np.ndarray]:
    return logits(build(checkpoint, checkpoint.parent / "plain", precision="int4", max_context=CONTEXT))


def logits(bundle: Path, **options: object) -> list[np.ndarray]:
    """Of a prompt, a verify that is kept in part, a step of two sequences, and of the draft head."""
    with load(bundle, threads=1, **options) as model:  # type: ignore[arg-type]
        decoder = model.decoder(2, drafts=True)
        seen = [np.array(decoder.prefill(PROMPT)), np.array(decoder.run([Read(1, PROMPT[:2], logits=1)])[0].array)]
        seen.append(np.array(decoder.verify([1, 2, 3]).array))
        decoder.accept(2)
        seen.append(np.array(decoder.step([8, 9])))
        assert decoder.head is not None
        seen += [np.array(row.array) for row in decoder.head.first({0: 5, 1: 6}).values()]
        return seen


def expert_bytes(bundle: Path) -> tuple[int, int]:
    """Bytes of the experts, and of all other weights of all graphs."""
    experts = others = 0
    for graph in load_manifest(bundle).graphs.values():
        for weight in graph.weights:
            if weight.name in graph.bound:
                experts += weight_bytes(weight)
            else:
                others += weight_bytes(weight)
    return experts, others


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    def use(link: float, host: float) -> None:
        monkeypatch.setattr(memory_rates, "link_rate", lambda index: link)
        monkeypatch.setattr(memory_rates, "host_rate", lambda: host)

    return use


def test_experts_that_are_inputs_change_no_logit(bundle: Path, checkpoint: Path, expected: list[np.ndarray]) -> None:
    for have, want in zip(logits(bundle), expected, strict=True):
        np.testing.assert_array_equal(have, want)
    for graph in load_manifest(bundle).graphs.values():
        assert graph.bound and all(".mlp.experts." in name for name in graph.bound)
        assert not set(graph.bound) & {tensor.name for tensor in graph.inputs}
    verify(bundle, checkpoint)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_does_not_fit_stays_in_host_memory(
    bundle: Path, expected: list[np.ndarray], driver: FakeDriver, rates: Callable[[float, float], None], share: float
) -> None:
    rates(50e9, 50e9)
    experts, others = expert_bytes(bundle)
    with cuda_sessions() as sessions:
        seen = logits(bundle, device="cuda", device_id=1, weight_budget=others + int(share * experts))
        assert ("cuda", 1) in sessions.bound
    for have, want in zip(seen, expected, strict=True):
        np.testing.assert_allclose(have, want, atol=1e-4)


def test_the_budget_decides_where_they_are(bundle: Path, driver: FakeDriver, rates: Callable[[float, float], None]) -> None:
    rates(50e9, 50e9)
    experts, others = expert_bytes(bundle)
    on_host = []
    for share in (1.0, 0.6, 0.0):
        with cuda_sessions(), load(bundle, device="cuda", threads=1, weight_budget=others + int(share * experts)) as model:
            model.decoder(drafts=True).prefill(PROMPT)
            on_host.append(sum(size for size in driver.pinned.values() if size > 4096))
        gc.collect()  # what refers to a model that is closed may be a circle
    assert on_host[0] < on_host[1] < on_host[2]
    assert on_host[1] - on_host[0] <= 0.6 * experts
    assert on_host[2] - on_host[0] == experts


def test_without_a_budget_the_free_memory_decides(bundle: Path, driver: FakeDriver, rates: Callable[[float, float], None]) -> None:
    rates(50e9, 1.0)
    driver.memory = 8 << 30
    with cuda_sessions(), load(bundle, device="cuda", threads=1) as model:
        model.decoder().prefill(PROMPT)
    driver.memory = 1 << 30
    with cuda_sessions(), pytest.raises(ParameterError, match="weight_budget"):
        load(bundle, device="cuda", threads=1)


def test_slower_than_the_cpu_is_refused(bundle: Path, driver: FakeDriver, rates: Callable[[float, float], None]) -> None:
    experts, others = expert_bytes(bundle)
    rates(1e9, 500e9)
    with cuda_sessions(), pytest.raises(BundleError, match=r"slower than the CPU alone.*1 GB/s.*500 GB/s.*device"):
        load(bundle, device="cuda", threads=1, weight_budget=others)
    with cuda_sessions(), load(bundle, device="cuda", threads=1, weight_budget=others + experts):
        pass  # nothing is in host memory


@pytest.mark.usefixtures("fake_library")
def test_the_graphs_for_a_gpu_have_them_as_inputs(tmp_path: Path) -> None:
    widths = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "shared_expert_intermediate_size": 32}
    source = open_checkpoint(synthesize(tiny_config(vision=False, moe=True, **widths), tmp_path / "checkpoint"))
    models = lower(source, plan_build(source, device="cuda", precision="int4", host_experts=True))
    for model in models.values():
        made = with_inputs(model).graph
        read = [value for node in made if node.op_type == "QuantMixture" for value in node.inputs[6:]]
        assert read and all(value in made.inputs for value in read)
        assert [value.name for value in made.inputs[len(model.graph.inputs) :]] == list(expert_weights(model))


def test_builds_that_cannot_be_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    dense = synthesize(tiny_config(vision=False), tmp_path / "dense")
    for source, options, message in (
        (dense, {"precision": "int4"}, "no experts"),
        (checkpoint, {}, "int4 or int8"),
        (checkpoint, {"precision": "int4", "stages": 2}, "one GPU"),
        (checkpoint, {"precision": "int4", "target": "onnx"}, "target onnx"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            build(source, tmp_path / "bundle", host_experts=True, **options)  # type: ignore[arg-type]


def test_a_manifest_that_binds_no_weight_is_refused(bundle: Path) -> None:
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["graphs"]["decoder"]["bound"].append("layers.0.mlp.gate.weight_")
    with pytest.raises(ValueError, match="binds what is no weight"):
        check(parse(raw))
