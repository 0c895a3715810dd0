"""Mixtures of experts on CUDA: what their graphs are made of, and bundles next to torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.plugins.native.native_library import LIBRARIES
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.decoder import Decoder
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize
from tests.test_parity import CAPACITY, prompt

Make = Callable[..., Path]


@pytest.mark.parametrize(("precision", "experts"), [("bf16", "MoE"), ("fp8", "Fp8Moe")])
def test_a_cuda_graph(make_checkpoint: Make, fake_library: Path, precision: str, experts: str) -> None:
    """One node per layer for the experts, one for the norm that they share with other readers, and one for what is added up behind them."""
    config = tiny_config(moe=True, num_experts=16, vision=False, linear_key_head_dim=64, linear_value_head_dim=64)
    checkpoint = open_checkpoint(make_checkpoint(config))
    graphs = lower(checkpoint, plan_build(checkpoint, device="cuda", precision=precision))
    for model, layers in ((graphs["decoder"], 4), (graphs["mtp"], 1)):
        counts = Counter(node.op_type for node in model.graph)
        assert counts[experts] == counts["SharedExpertSum"] == layers
        assert not {"FusedMatMul", "Sigmoid", "Mul", "Add", "SkipSimplifiedLayerNormalization"} & set(counts)
        assert not [node for node in model.graph if node.domain == "qwen"]
    sums = [node for node in graphs["decoder"].graph if node.op_type == "SharedExpertSum"]
    for i, node in enumerate(sums):
        mixture, shared, x, gate, residual = node.inputs
        assert mixture.producer().op_type == experts and mixture.producer().inputs[0] is x and x.producer().op_type == "RmsNorm"
        assert shared.producer().op_type.endswith("Linear") and gate.name == f"layers.{i}.mlp.shared_expert_gate.weight"
        assert (gate.dtype, [*gate.shape]) == (node.outputs[0].dtype, [1, checkpoint.config.text.hidden_size])
        assert (residual.name, node.outputs[0].name) == (f"layers.{i}.mixed", f"layers.{i}.output"), "names that the layer check reads"


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_a_cuda_graph_of_integers(make_checkpoint: Make, fake_library: Path, precision: str) -> None:
    """A mixture is one node per layer, from the stream behind the mixer to that behind the layer."""
    config = tiny_config(moe=True, num_experts=16, vision=False, linear_key_head_dim=64, linear_value_head_dim=64)
    checkpoint = open_checkpoint(make_checkpoint(config))
    graphs = lower(checkpoint, plan_build(checkpoint, device="cuda", precision=precision))
    for model, layers in ((graphs["decoder"], 4), (graphs["mtp"], 1)):
        counts = Counter(node.op_type for node in model.graph)
        assert counts["QuantMixture"] == layers
        assert not {"QuantMoe", "SharedExpertSum", "QuantSwiGlu", "Linear", "SwiGlu", "FusedMatMul", "Sigmoid", "Mul", "Add"} & set(counts)
    for i, node in enumerate(node for node in graphs["decoder"].graph if node.op_type == "QuantMixture"):
        points = [f"layers.{i}.mixed", f"layers.{i}.output"]
        assert [node.inputs[0].name, node.outputs[0].name] == points, "names that the layer check reads"
        router, gate = node.inputs[2:4]
        assert (router.name, gate.name) == (f"layers.{i}.mlp.gate.weight", f"layers.{i}.mlp.shared_expert_gate.weight")
        assert node.attributes.get_int("experts_top_k") == checkpoint.config.text.num_experts_per_tok
        assert node.attributes.get_float("norm_epsilon") == pytest.approx(checkpoint.config.text.rms_norm_eps)


def test_experts_in_integers_beside_a_shared_expert_as_stored(make_checkpoint: Make, fake_library: Path, tmp_path: Path) -> None:
    """What is not all integers stays apart."""
    plan = tmp_path / "plan.toml"
    plan.write_text('[matrices]\n"layers.1.mlp.shared_expert.*" = { format = "stored" }\n')
    config = tiny_config(moe=True, num_experts=16, vision=False, linear_key_head_dim=64, linear_value_head_dim=64)
    checkpoint = open_checkpoint(make_checkpoint(config, with_mtp=False))
    graph = lower(checkpoint, plan_build(checkpoint, device="cuda", precision="int4", plan_file=plan))["decoder"].graph
    counts = Counter(node.op_type for node in graph)
    assert (counts["QuantMixture"], counts["QuantMoe"], counts["SharedExpertSum"], counts["RmsNorm"]) == (3, 1, 1, 1 + 1)


def test_a_cuda_graph_without_the_plugin(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's own kernels."""
    monkeypatch.setenv(LIBRARIES["cuda"].variable, "")
    checkpoint = open_checkpoint(make_checkpoint(tiny_config(moe=True, num_experts=16, vision=False)))
    graph = lower(checkpoint, plan_build(checkpoint, device="cuda", precision="bf16"))["decoder"].graph
    counts = Counter(node.op_type for node in graph)
    assert counts["MoE"] == 4 and not [node for node in graph if node.domain.startswith("qwen")]
    # the shared experts' gates, and those of the attention layer
    assert counts["Sigmoid"] == 4 + 1


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.02), ("bf16", 0.12)])
def test_a_cuda_bundle(tmp_path: Path, precision: str, tolerance: float) -> None:
    config = tiny_config(moe=True, linear_key_head_dim=32, linear_value_head_dim=32, num_experts=16, num_experts_per_tok=4, vision=False)
    checkpoint = synthesize(config, tmp_path / "checkpoint", with_mtp=False)
    ids = prompt(40, 1)
    expected = EagerSequence(load_decoder(open_checkpoint(checkpoint)), CAPACITY).read(ids)
    decoder = load(build(checkpoint, tmp_path / "bundle", device="cuda", precision=precision, max_context=CAPACITY)).decoder()
    # Rounding makes a random router choose another expert for a token now and then: its row is off, the others are not.
    for logits in (decoder.read(ids).copy(), _token_by_token(decoder, ids)):
        assert np.quantile(np.abs(logits - expected).max(axis=1), 0.75) <= tolerance


def _token_by_token(decoder: Decoder, ids: list[int]) -> np.ndarray:
    decoder.reset()
    return np.concatenate([decoder.step([token]).copy() for token in ids])
