"""Mixture of experts on the targets with standard operators: gathered matrices, whole and quantized, and bundles next to transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.building.static_plan import StaticOptions
from qwen_export.errors import UnsupportedError
from qwen_export.graphs.call_sizes import CallSizes
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.config import parse_config
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.graphs.ops.moe_op import moe
from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.passes.lowering_choice import Choice
from qwen_export.graphs.passes.pass_context import PassContext, new_node
from qwen_export.graphs.quantization.packing import dequantize
from qwen_export.graphs.quantization.precision_plan import GroupFormat, PrecisionPlan, load_plan
from qwen_export.graphs.quantization.scale_search import quantize
from qwen_export.graphs.weights.expression import StoredWeight, add_weight, weight_of
from qwen_export.manifest import load_manifest
from qwen_export.plugins.emitter import Emitter
from qwen_export.plugins.standard import standard_experts
from qwen_export.runtimes import load
from qwen_export.verification.logit_check import TOLERANCE as DEVIATIONS
from qwen_export.verification.logit_check import verify
from tests.support.answers import drafted, plain
from tests.support.family import tiny_config
from tests.support.quantizers import gptq, quantize_checkpoint
from tests.support.standard_graphs import emitted, session
from tests.support.static_bundles import reference_logits
from tests.support.synthesize import synthesize
from tests.test_demo_bundles import HELD_OUT
from tests.test_parity import TOLERANCE, prompt

Array = npt.NDArray[Any]
FLOAT = ir.DataType.FLOAT
DEVICES = {"onnx": "cpu", "directml": "dml"}
GATE_UP, DOWN = (f"layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


# The op


def experts_graph(T: int, K: int, weights: dict[str, Array], plan: PrecisionPlan | None = None) -> onnx.ModelProto:
    """moe over stored matrices, as calls of T tokens have it."""
    E, H, _ = weights[DOWN].shape
    config, sizes = parse_config(tiny_config(moe=True, layers=1)).text, CallSizes(T, 0, 64, 1, padded=False)
    context = PassContext(config, "fp32", {"moe": Choice("gathered", ())}, quantization=plan, sizes=sizes)

    def make(emit: Emitter, given: dict[str, ir.Value]) -> list[ir.Value]:
        matrices = [add_weight(emit.graph, name, StoredWeight(name, weights[name].shape, FLOAT)) for name in (GATE_UP, DOWN)]
        node = new_node(DOMAIN, "moe", [given["x"], given["logits"], *matrices], like=given["x"], top_k=K)
        nodes, outputs = standard_experts.lower_experts(emit.graph, node, context, {})
        emit.nodes += nodes
        for value in matrices:
            if not value.uses():
                del emit.graph.initializers[str(value.name)]
        return outputs

    return emitted({"x": ((1, T, H), FLOAT), "logits": ((1, T, E), FLOAT)}, make, weights)


def random_case(T: int, E: int, H: int = 32, width: int = 32) -> tuple[dict[str, Array], dict[str, Array]]:
    """Activations and matrices; one expert is chosen by most tokens, one by none."""
    rng = np.random.default_rng([T, E])
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in {"x": (1, T, H), "logits": (1, T, E)}.items()}
    made["logits"][0, :, 0] += 3
    made["logits"][0, :, E - 1] -= 9
    weights = {GATE_UP: rng.standard_normal((E, 2 * width, H)), DOWN: rng.standard_normal((E, H, width))}
    return made, {name: (values / 8).astype(np.float32) for name, values in weights.items()}


def expected(feeds: dict[str, Array], weights: dict[str, Array], K: int) -> Array:
    return moe(*(torch.from_numpy(values) for values in (*feeds.values(), weights[GATE_UP], weights[DOWN])), K).numpy()


@pytest.mark.parametrize("in_rounds", [False, True])
@pytest.mark.parametrize(("T", "E", "K"), [(1, 8, 2), (4, 64, 8), (96, 8, 4), (130, 4, 4), (40, 16, 1), (3, 1, 1)])
def test_every_pair_reaches_its_expert(T: int, E: int, K: int, in_rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pairs one by one, many in blocks; all at once and three experts at a time; uneven loads, experts without tokens."""
    feeds, weights = random_case(T, E)
    if in_rounds:
        monkeypatch.setattr(standard_experts, "ROUND_BYTES", 3 * weights[GATE_UP][0].nbytes)
    model = experts_graph(T, K, weights)
    (y,) = session(model).run(None, feeds)
    assert np.abs(y - expected(feeds, weights, K)).max() < 1e-5
    assert {node.op_type for node in model.graph.node if {GATE_UP, DOWN} & set(node.input)} == {"Gather"}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_quantized_matrices_are_gathered_as_codes(precision: str, zeros: bool) -> None:
    feeds, weights = random_case(5, 8)
    format = GroupFormat(precision, 32, "rtn", zeros)
    assert format.quant is not None
    model = experts_graph(5, 2, weights, PrecisionPlan({"experts": format}))
    (y,) = session(model).run(None, feeds)
    rounded = {
        name: np.stack([dequantize(format.quant, *quantize(format.quant, matrix, "rtn")) for matrix in w]) for name, w in weights.items()
    }
    assert np.abs(y - expected(feeds, rounded, 2)).max() < 1e-4
    stored = {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer if tensor.name.endswith(".codes")}
    assert stored == {f"{name}.codes": w.size * format.quant.bits // 8 for name, w in weights.items()}


# Bundles


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(moe=True, vision=False, layers=4, num_experts=16, num_experts_per_tok=4, value_ratio=2, query_ratio=4)
    return synthesize(config, tmp_path_factory.mktemp("experts") / "checkpoint", fused_experts=False)


@pytest.fixture(scope="module", params=["onnx", "directml"])
def bundle(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output, device = tmp_path_factory.mktemp("bundles") / request.param, DEVICES[request.param]
    return build(checkpoint, output, target=request.param, device=device, precision="fp32", max_context=160, options=StaticOptions(48))


def test_logits_are_those_of_transformers(bundle: Path, checkpoint: Path) -> None:
    ids, machine = prompt(110), load(bundle, threads=1, device="cpu").decoder()
    reference = reference_logits(checkpoint)(ids)
    assert np.abs(machine.prefill(ids[:97]) - reference[96]).max() <= TOLERANCE
    for token, row in zip(ids[97:102], reference[97:], strict=False):
        assert np.abs(machine.step([token])[0] - row).max() <= TOLERANCE
    assert np.abs(machine.verify(ids[102:106]) - reference[102:106]).max() <= TOLERANCE


def test_drafts_change_nothing(bundle: Path) -> None:
    model, ids = load(bundle, threads=1, device="cpu"), prompt(60, 4)
    tokens, _ = drafted(model.decoder(drafts=True), ids, 20, 3)
    assert tokens == plain(model.decoder(), ids, 20)


def test_experts_are_read_by_gathering_alone(bundle: Path) -> None:
    """No node has all of them as an input or an output but the one that takes some out."""
    for name, spec in load_manifest(bundle).graphs.items():
        graph = ir.load(bundle / spec.file).graph
        matrices = [value for stored, value in graph.initializers.items() if ".mlp.experts." in stored]
        assert bool(matrices) == (name != "mtp_prefill"), "the draft head's prompt graph makes keys and values only"
        assert all(node.op_type == "Gather" for value in matrices for node in value.consumers())


@pytest.mark.parametrize(("target", "precision"), [("onnx", "int4"), ("directml", "fp16")])
def test_the_trained_model(target: str, precision: str, demo_moe_checkpoint: Path, tmp_path: Path) -> None:
    """With the draft head, which has experts too: the text with drafts is the text without, and the logits those of the rounded weights."""
    options = StaticOptions(48)
    made = build(
        demo_moe_checkpoint, tmp_path / "made", target=target, device=DEVICES[target], precision=precision, max_context=256, options=options
    )
    model = load(made, threads=2, device="cpu")
    ids = model.tokenizer.encode(HELD_OUT.read_text())[:80]
    plan = None if precision == "fp16" else load_plan(precision, None, tied=True)
    reference = EagerSequence(load_decoder(open_checkpoint(demo_moe_checkpoint), plan), len(ids)).read(ids)[-1]
    tokens, statistics = drafted(model.decoder(drafts=True), ids, 40, 3)
    assert np.abs(model.decoder().prefill(ids) - reference).max() <= DEVIATIONS[precision] * reference.std()
    assert statistics.speculation.tokens_per_round > 1.3
    if target == "directml":  # with activations rounded to 8 bits, calls of other sizes round otherwise
        assert tokens == plain(model.decoder(), ids, 40)


def test_verify_passes(bundle: Path, checkpoint: Path) -> None:
    report = verify(bundle, checkpoint, device="cpu")
    assert report["passed"], report


def test_codes_of_a_checkpoint_are_kept(tmp_path: Path) -> None:
    """Those of single experts, as GPTQ releases store them."""
    config = tiny_config(moe=True, vision=False, layers=4, shared_expert_intermediate_size=64)
    source = synthesize(config, tmp_path / "source", fused_experts=False, with_mtp=False)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    made = quantize_checkpoint(source, tmp_path / "made", gptq(32), settings)
    source = open_checkpoint(made.path)
    plan = plan_build(source, "onnx", precision="int4", max_context=64, options=StaticOptions(16))
    graph = lower(source, plan)["decoder"].graph
    matrices = load_decoder(open_checkpoint(made.plain)).state_dict()
    with CheckpointReader(source) as reader:
        for name in (GATE_UP, DOWN):
            parts = [weight_of(graph.initializers[f"{name}.{label}"]) for label in ("codes", "scales")]
            codes, scales = (part.evaluate(reader) for part in parts if part is not None)
            values = np.concatenate([codes & 15, codes >> 4], axis=2).astype(np.float32) - 8
            assert np.array_equal(values * np.repeat(scales, 32, axis=2), matrices[name].numpy())


def test_rows_of_experts_that_are_not_whole_blocks_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text("[experts]\nblock = 128\n")
    with pytest.raises(UnsupportedError, match=r"experts\..* has rows of \d+ values, which are not whole blocks of 128"):
        plan_build(open_checkpoint(checkpoint), "onnx", precision="int4", plan_file=file, max_context=64, options=StaticOptions(16))
