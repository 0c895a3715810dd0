"""Mixture of experts: the op, both layouts of the experts, Qwen3-Next, and bundles next to transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.errors import CaptureError, CheckpointError, ConfigError
from qwen_export.graphs.capture import capture_decoder
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.tensor_names import StoredLayout, check_tensors, layer_tensors, stored_tensors
from qwen_export.graphs.checkpoint.tensor_table import tensor_table
from qwen_export.graphs.config import FULL, LINEAR, parse_config
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder, load_mtp
from qwen_export.graphs.ops.moe_op import moe, route
from qwen_export.graphs.passes.check_invariants import verify_graph
from qwen_export.graphs.quantization.precision_plan import load_plan
from qwen_export.graphs.weights.expression import StoredWeight, weight_of
from qwen_export.graphs.weights.stored_layout import parameter_weight, resolve_layout
from qwen_export.manifest import load_manifest
from qwen_export.plugins.native.native_library import LIBRARIES, find_library
from qwen_export.runtimes import load
from tests.support import moe_ops
from tests.support.answers import drafted, plain
from tests.support.family import FAMILY, tiny_config
from tests.support.instruction_sets import check_in_instruction_set
from tests.support.quantizers import Quantizer, block_fp8, gptq, quantize_checkpoint
from tests.support.synthesize import synthesize
from tests.test_demo_bundles import HELD_OUT
from tests.test_demo_bundles import _perplexity as perplexity
from tests.test_parity import CAPACITY, TOLERANCE, Logits, cached_decode, error, prompt

Make = Callable[..., Path]
NATIVE = find_library("cpu")
needs_library = pytest.mark.skipif(NATIVE is None, reason="plugins/native/cpu/build.sh has not been run")


def tiny(**options: Any) -> dict[str, Any]:
    return tiny_config(moe=True, linear_key_head_dim=32, linear_value_head_dim=32, **options)


# ---- the op


@pytest.mark.parametrize(("E", "K"), [(8, 2), (256, 8), (512, 10), (3, 3), (1, 1)])
def test_the_op_is_the_weighted_sum_over_the_selected_experts(E: int, K: int) -> None:
    layer = moe_ops.plain_layer(E, K, 16, 6)
    x, logits = moe_ops.tokens(layer, 12)
    got = moe(*(torch.from_numpy(a) for a in (x, logits, *layer.inputs)), K)
    assert moe_ops.error(got.numpy(), moe_ops.expected(layer, x, logits)) < 2e-6
    both = moe(*(torch.from_numpy(a) for a in (x.reshape(3, 4, -1), logits.reshape(3, 4, -1), *layer.inputs)), K)
    assert both.shape == (3, 4, 16) and torch.equal(both.reshape(12, 16), got)


def test_experts_that_are_not_selected_are_not_computed() -> None:
    layer = moe_ops.plain_layer(16, 2, 16, 6)
    x, logits = moe_ops.tokens(layer, 3)
    _, selected = route(torch.from_numpy(logits), 2)
    idle = sorted({*range(16)} - {*selected.flatten().tolist()})
    gate_up, down = (torch.from_numpy(a.copy()) for a in layer.inputs)
    gate_up[idle] = down[idle] = float("nan")
    assert moe(torch.from_numpy(x), torch.from_numpy(logits), gate_up, down, 2).isfinite().all()


def test_the_router_works_in_fp32() -> None:
    """Two probabilities that bf16 cannot tell apart are ranked by fp32, and weights sum to 1."""
    logits = torch.tensor([[0.0, 5.0, 5.03125, 5.0625]], dtype=torch.bfloat16)
    weight, expert = route(logits, 2)
    assert expert.tolist() == [[3, 2]] and weight.dtype == torch.bfloat16
    exact = torch.softmax(logits.double()[0, [3, 2]], 0)
    torch.testing.assert_close(weight[0].double(), exact, rtol=4e-3, atol=0)


@needs_library
def test_the_native_op_selects_what_torch_selects_among_equals() -> None:
    for E, K in ((256, 8), (512, 10), (64, 1), (1024, 10)):
        layer = moe_ops.plain_layer(E, K, 16, 8)
        x, logits = moe_ops.tokens(layer, 60)
        for tied in (np.round(logits), np.zeros_like(logits)):
            got = moe_ops.call(str(NATIVE), layer, x, tied)
            assert moe_ops.error(got, moe_ops.expected(layer, x, tied)) < 2e-6


@needs_library
@pytest.mark.parametrize("instructions", ["base", "base_tiles", "avx2", "avx512", "amx"])
def test_the_native_op_in_every_form(instructions: str) -> None:
    """fp32, bf16, int4 and int8 weights, one token to many; equal tokens give equal bits."""
    check_in_instruction_set(moe_ops, str(NATIVE), instructions)


# ---- layouts


def test_per_expert_matrices_make_the_fused_tensors(tmp_path: Path) -> None:
    """transformers stores the experts of a model that it made itself one by one."""
    fused = synthesize(tiny(vision=False), tmp_path / "fused", dtype="fp32", with_mtp=False)
    loaded = transformers.Qwen3_5MoeForCausalLM.from_pretrained(fused, dtype=torch.float32)
    fresh = transformers.Qwen3_5MoeForCausalLM(loaded.config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(tmp_path / "split")
    split = open_checkpoint(tmp_path / "split")
    assert "model.layers.3.mlp.experts.7.gate_proj.weight" in split.tensors
    ours = load_decoder(split).state_dict()
    for name, tensor in load_decoder(open_checkpoint(fused)).state_dict().items():
        assert torch.equal(ours[name], tensor), name


def test_each_layer_has_its_own_layout(make_checkpoint: Make) -> None:
    """The released 3.5 checkpoints: decoder fused, draft head per expert."""
    checkpoint = open_checkpoint(make_checkpoint(tiny(), fused_experts=True, fused_mtp_experts=False))
    stored = StoredLayout.of(checkpoint)
    assert stored.per_expert == {"mtp.layers.0."} and not stored.grouped_inputs
    config = checkpoint.config.text
    for prefix, kind, of in (("mtp.layers.0.", FULL, ""), ("layers.1.", LINEAR, checkpoint.config.text_prefix)):
        found = {name: info.shape for name, info in checkpoint.tensors.items() if name.startswith(of + prefix)}
        assert found == {of + name: shape for name, shape in layer_tensors(config, prefix, kind, stored)}
    weight = parameter_weight(config, stored, "mtp.layers.0.mlp.experts.gate_up_proj", (8, 64, 64), ir.DataType.FLOAT)
    assert weight.shape == (8, 64, 64)
    assert next(weight.stored()) == "mtp.layers.0.mlp.experts.0.gate_proj.weight"
    down = parameter_weight(config, stored, "layers.1.mlp.experts.down_proj", (8, 64, 32), ir.DataType.FLOAT)
    assert down == StoredWeight("layers.1.mlp.experts.down_proj", (8, 64, 32), ir.DataType.FLOAT)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    table = [entry for entry in tensor_table(tiny(vision=False)) if not entry.name.startswith("mtp.")]
    checkpoint = open_checkpoint(synthesize(tiny(vision=False), tmp_path / "made", fused_experts=False, with_mtp=False))
    assert len(checkpoint.tensors) == len(table) + 4 * (8 * 3 - 2)
    del checkpoint.tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.5\.up_proj"):
        check_tensors(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"), [("norm_topk_prob", False), ("decoder_sparse_step", 2), ("mlp_only_layers", [0]), ("num_experts_per_tok", 9)]
)
def test_a_router_that_is_not_implemented_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config(tiny(generation="next", **{key: value}))


def test_the_configuration_of_qwen3_next() -> None:
    config = parse_config(FAMILY["next-80B-A3B"])
    text = config.text
    assert config.text_prefix == "model." and text.is_moe and text.layer_types.count(FULL) == 12
    assert (text.rope.theta, text.rotary_dim, text.rope.mrope_section) == (1e7, 64, ())
    assert (text.num_experts, text.num_experts_per_tok, text.intermediate_size) == (512, 10, 0)


def test_the_largest_release_is_captured_without_weights() -> None:
    """397B, stored per expert: 93078 tensors behind 1038 parameters. Four of its layers, which are 13 GB each."""
    whole = parse_config(FAMILY["397B-A17B"]).text
    layers = frozenset(f"layers.{i}." for i in range(whole.num_layers))
    stored = StoredLayout(layers, frozenset())
    assert sum(1 for _ in stored_tensors(whole, stored)) == 93078
    config = replace(whole, layer_types=whole.layer_types[:4])
    model = capture_decoder(config, "bf16")
    assert resolve_layout(model, config, stored) == 2 * config.num_layers
    assert sum(weight.nbytes for value in model.graph.initializers.values() if (weight := weight_of(value))) > 52e9


# ---- bundles next to transformers

# Configuration, layout and class of transformers.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "8-of-256": (tiny(num_experts=256, num_experts_per_tok=8), {}, transformers.Qwen3_5MoeForConditionalGeneration),
    "10-of-512-split": (
        tiny(num_experts=512, num_experts_per_tok=10, moe_intermediate_size=16, vision=False, tied=True),
        {"fused_experts": False},
        transformers.Qwen3_5MoeForCausalLM,
    ),
    "1-of-1": (tiny(num_experts=1, num_experts_per_tok=1, vision=False), {}, transformers.Qwen3_5MoeForCausalLM),
    "next": (
        tiny(generation="next", num_experts=64, num_experts_per_tok=10, value_ratio=3),
        {"fused_experts": False, "grouped_inputs": True, "fp32_decay": False},
        transformers.Qwen3NextForCausalLM,
    ),
}


# Built for the kernels of ONNX Runtime too.
PLAIN = ("8-of-256",)


class Model:
    """One checkpoint in transformers, as eager modules, and as bundles with and without our library."""

    def __init__(self, name: str, directory: Path, patch: pytest.MonkeyPatch) -> None:
        config, options, kind = MODELS[name]
        self.checkpoint = synthesize(config, directory / "checkpoint", with_mtp=False, **options)
        self.reference, found = kind.from_pretrained(self.checkpoint, dtype=torch.float32, output_loading_info=True)
        assert not found["missing_keys"] and not found["mismatched_keys"]
        self.eager = load_decoder(open_checkpoint(self.checkpoint))
        self.bundles = []
        if NATIVE is not None:
            self.bundles.append(build(self.checkpoint, directory / "native", max_context=CAPACITY))
        if name in PLAIN or NATIVE is None:
            with patch.context() as context:
                context.setenv(LIBRARIES["cpu"].variable, "")
                self.bundles.append(build(self.checkpoint, directory / "plain", max_context=CAPACITY))
        lowerings = {bundle.name: load_manifest(bundle).source["lowerings"]["moe"] for bundle in self.bundles}
        assert lowerings.items() <= {"native": "native_moe", "plain": "microsoft_moe"}.items()

    @torch.no_grad()
    def expected(self, ids: list[int]) -> Logits:
        return np.asarray(self.reference(torch.tensor([ids])).logits[0].numpy())


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    transformers.utils.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        yield Model(request.param, tmp_path_factory.mktemp("moe"), patch)


def test_prefill_in_one_call_and_in_chunks(model: Model) -> None:
    ids = prompt(70, 1)
    expected = model.expected(ids)
    assert error(EagerSequence(model.eager, CAPACITY).read(ids), expected) <= TOLERANCE
    for bundle in model.bundles:
        decoder = load(bundle, threads=2).decoder()
        assert error(decoder.read(ids), expected) <= TOLERANCE
        for cut in (2, 9):
            decoder.reset()
            first = decoder.read(ids[:cut]).copy()
            assert error(np.concatenate([first, decoder.read(ids[cut:])]), expected) <= TOLERANCE


def test_decode_token_by_token(model: Model) -> None:
    ids = prompt(24, 2)
    cached = cached_decode(model.reference, ids, 6)
    sequence = EagerSequence(model.eager, CAPACITY)
    assert error(np.concatenate([sequence.read(ids[:6])[-1:], *(sequence.read([t]) for t in ids[6:])]), cached) <= TOLERANCE
    for bundle in model.bundles:
        decoder = load(bundle, threads=2).decoder()
        first = decoder.prefill(ids[:6])[None].copy()
        assert error(np.concatenate([first, *(decoder.step([token]).copy() for token in ids[6:])]), cached) <= TOLERANCE


def test_a_batch(model: Model) -> None:
    """Three sequences in one step are three tokens for the experts, whoever they belong to."""
    prompts, steps = [prompt(11, 3), prompt(4, 4), prompt(17, 5)], 5
    texts = [[*ids, *prompt(steps, 10 + i)] for i, ids in enumerate(prompts)]
    for bundle in model.bundles:
        batch = load(bundle, threads=2).decoder(3)
        rows = [[batch.prefill(ids, slot=i).copy()] for i, ids in enumerate(prompts)]
        for t in range(steps):
            logits = batch.step([text[len(ids) + t] for text, ids in zip(texts, prompts, strict=True)])
            for i in range(3):
                rows[i].append(logits[i].copy())
        for i, (text, ids) in enumerate(zip(texts, prompts, strict=True)):
            assert error(np.stack(rows[i]), model.expected(text)[len(ids) - 1 :]) <= TOLERANCE


def test_experts_stay_bf16_where_our_op_reads_them(model: Model) -> None:
    sizes = [load_manifest(bundle).files["model.weights"].size for bundle in model.bundles]
    if len(sizes) == 2:
        assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize(
    ("quantizer", "settings"),
    [
        (block_fp8(), {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}),
        (gptq(32), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}),
    ],
    ids=["fp8", "gptq"],
)
def test_quantized_experts_are_read_one_by_one(tmp_path: Path, quantizer: Quantizer, settings: dict[str, Any]) -> None:
    """The FP8 and GPTQ releases store every expert's matrices with scales of their own."""
    source = synthesize(tiny(vision=False, shared_expert_intermediate_size=64), tmp_path / "source", fused_experts=False, with_mtp=False)
    made = quantize_checkpoint(source, tmp_path / "made", quantizer, settings)
    expected = load_decoder(open_checkpoint(made.plain)).state_dict()
    for name, tensor in load_decoder(open_checkpoint(made.path)).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    decoder = load(build(made.path, tmp_path / "bundle", max_context=CAPACITY)).decoder()
    ids = prompt(20, 1)
    wanted = EagerSequence(load_decoder(open_checkpoint(made.plain)), CAPACITY).read(ids)
    assert error(decoder.read(ids), wanted) <= TOLERANCE


# ---- the draft head


@needs_library
def test_a_draft_head_of_experts_drafts_well_and_changes_nothing(demo_moe_checkpoint: Path, tmp_path: Path) -> None:
    """A trained mixture of experts, whose draft head is one too: the same greedy text, in fewer steps."""
    model = load(build(demo_moe_checkpoint, tmp_path / "bundle", max_context=512), threads=2)
    ids = model.tokenizer.encode(HELD_OUT.read_text())[:80]
    tokens, statistics = drafted(model.decoder(drafts=True), ids, 60, 3)
    assert tokens == plain(model.decoder(), ids, 60)
    assert statistics.speculation.tokens_per_round > 1.5


@pytest.mark.parametrize("fused", [True, False])
def test_the_draft_head_is_read_in_both_layouts(make_checkpoint: Make, fused: bool) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tiny(vision=False), fused_experts=not fused, fused_mtp_experts=fused))
    check_tensors(checkpoint)
    head = load_mtp(checkpoint, load_decoder(checkpoint), 512)
    assert head.mtp.layers[0].mlp.experts.gate_up_proj.shape == (8, 64, 64)
    graph = lower(checkpoint, plan_build(checkpoint))["mtp"].graph
    assert sum(node.op_type in ("Moe", "MoE") for node in graph) == 1
    (experts,) = (weight for name, value in graph.initializers.items() if "experts.down_proj" in name and (weight := weight_of(value)))
    assert len(list(experts.stored())) == (1 if fused else 8)


# ---- quantized experts


@needs_library
@pytest.mark.parametrize(("precision", "change"), [("int8", 0.005), ("int4", 0.04)])
def test_quantized_experts_of_the_trained_model(demo_moe_checkpoint: Path, tmp_path: Path, precision: str, change: float) -> None:
    """The bundle computes what the eager modules compute with the same rounded weights, and is about as good a model as before."""
    checkpoint = open_checkpoint(demo_moe_checkpoint)
    bundle = build(demo_moe_checkpoint, tmp_path / precision, precision=precision, max_context=512)
    model = load(bundle, threads=2)
    ids = model.tokenizer.encode(HELD_OUT.read_text())[:300]
    got = model.decoder().read(ids).copy()
    before = EagerSequence(load_decoder(checkpoint), len(ids)).read(ids)
    rounded = EagerSequence(load_decoder(checkpoint, load_plan(precision, None, tied=True)), len(ids)).read(ids)
    # Activations are rounded to 8 bits too: not equal, but much closer to their own weights than to those of the checkpoint.
    assert abs(perplexity(got, ids) / perplexity(rounded, ids) - 1) < 0.005
    assert abs(perplexity(got, ids) / perplexity(before, ids) - 1) < change
    graph = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph
    assert sum(node.op_type == "QuantMoe" for node in graph.node) == 8
    routers = [tensor for tensor in graph.initializer if ".mlp.gate." in tensor.name or ".shared_expert_gate." in tensor.name]
    assert len(routers) == 16 and all(tensor.data_type != onnx.TensorProto.UINT8 for tensor in routers)


@needs_library
def test_half_quantized_experts_are_refused(demo_moe_checkpoint: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[matrices]\n"layers.2.mlp.experts.down_proj" = { format = "stored" }\n')
    with pytest.raises(ConfigError, match="both matrices of the experts or neither"):
        build(demo_moe_checkpoint, tmp_path / "bundle", precision="int4", plan_file=plan)


def test_a_quantized_router_does_not_pass_the_verifier() -> None:
    model = capture_decoder(parse_config(tiny(layers=1)).text, "fp32")
    gate = model.graph.initializers["layers.0.mlp.gate.weight"]
    gate.type = ir.TensorType(ir.DataType.UINT8)
    with pytest.raises(CaptureError, match="router"):
        verify_graph(model, "a pass")
