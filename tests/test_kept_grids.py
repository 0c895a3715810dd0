"""Quantized checkpoints whose codes, zeros and scales go into the bundle as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qwen_export.building.build_plan import BuildPlan, default_precision, plan_build
from qwen_export.building.compiler import build
from qwen_export.building.lower_graphs import lower
from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.formats.logical_tensor import Grid
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.graphs.quantization.kept_grids import block_of
from qwen_export.graphs.quantization.packing import QuantFormat, dequantize, unpack
from qwen_export.manifest import load_manifest
from qwen_export.plugins.native.native_library import LIBRARIES, find_library
from qwen_export.runtimes import load
from qwen_export.verification.logit_check import verify
from tests.support import quantizers
from tests.support.family import tiny_config
from tests.support.packed_matrices import stored_bytes
from tests.support.quantizers import PROJECTIONS, QuantizedCheckpoint, Quantizer, quantize_checkpoint
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer

needs_plugin = pytest.mark.skipif(find_library("cpu") is None, reason="plugins/native/cpu/build.sh was not run")
PREFIX = "model."
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
PACKED = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group"}, "format": "pack-quantized"}


def packed(group: int, symmetric: bool) -> dict[str, Any]:
    scheme = {**PACKED, "weights": {**PACKED["weights"], "group_size": group, "symmetric": symmetric}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": scheme}}


# How to quantize, quantization_config, what the plan says, the layout that its codes fit into.
FORMS: dict[str, tuple[Quantizer, dict[str, Any], str, QuantFormat]] = {
    "gptq": (quantizers.gptq(128), GPTQ, "gptq int4 group 128", QuantFormat(4, 128)),
    "gptq-asymmetric": (
        quantizers.gptq(64, symmetric=False),
        GPTQ | {"sym": False, "group_size": 64},
        "gptq int4 group 64 zeros",
        QuantFormat(4, 64, True),
    ),
    "awq": (
        quantizers.awq(128),
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        "awq int4 group 128 zeros",
        QuantFormat(4, 128, True),
    ),
    "packed-rows": (
        quantizers.pack_quantized(256),
        packed(256, True),
        "compressed-tensors int4 group 256",
        QuantFormat(4, 128, False, True),
    ),
    "int8-rows": (
        quantizers.scaled(torch.int8, "channel"),
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}},
        "int8 per channel",
        QuantFormat(8, 128, False, True),
    ),
    "packed-asymmetric": (
        quantizers.pack_quantized(32, symmetric=False),
        packed(32, False),
        "compressed-tensors int4 group 32 zeros",
        QuantFormat(4, 32, True, True),
    ),
}

Make = Callable[..., QuantizedCheckpoint]


def wide(directory: Path, key_head_dim: int) -> Path:
    config = tiny_config(hidden_size=256, intermediate_size=512, linear_key_head_dim=key_head_dim, linear_value_head_dim=64, vision=False)
    return synthesize(config, directory / "checkpoint", tokenizer=write_tiny_tokenizer(directory / "tokenizer"))


def maker(source: Path, out: Path) -> Make:
    def make(quantizer: Quantizer, config: dict[str, Any], chosen: re.Pattern[str] = PROJECTIONS) -> QuantizedCheckpoint:
        return quantize_checkpoint(source, out, quantizer, config, chosen)

    return make


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide(tmp_path_factory.mktemp("wide"), key_head_dim=32)


@pytest.fixture
def made(source: Path, tmp_path: Path) -> Make:
    return maker(source, tmp_path / "made")


@pytest.fixture
def made_square(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Make:
    """Keys and values of one size, as CUDA's kernels take them."""
    return maker(wide(tmp_path_factory.mktemp("square"), key_head_dim=64), tmp_path / "made")


def plan_of(path: Path, precision: str = "int4", **options: Any) -> BuildPlan:
    return plan_build(open_checkpoint(path), precision=precision, **options)


def outcome(plan: BuildPlan) -> dict[str, int]:
    assert plan.quantization is not None
    total: dict[str, int] = {}
    for counts in plan.quantization.outcome.values():
        for what, count in counts.items():
            total[what] = total.get(what, 0) + count
    return total


def stored_scales(made: QuantizedCheckpoint, module: str) -> torch.Tensor:
    """[O, G], as the form has them."""
    if f"{module}.scales" in made.stored:
        return made.stored[f"{module}.scales"].T
    return made.stored[f"{module}.weight_scale"]


def stored_zeros(made: QuantizedCheckpoint, module: str) -> npt.NDArray[np.int64] | None:
    """[O, G], nibble by nibble."""
    if f"{module}.qzeros" in made.stored:
        words, awq = made.stored[f"{module}.qzeros"].numpy().astype(np.int64), f"{module}.g_idx" not in made.stored
        zeros = np.empty((words.shape[1] * 8, words.shape[0]), np.int64)
        for o in range(len(zeros)):
            nibble = [0, 4, 1, 5, 2, 6, 3, 7][o % 8] if awq else o % 8
            zeros[o] = (words[:, o // 8] >> (4 * nibble)) % 16 if awq else ((words[:, o // 8] >> (4 * nibble)) + 1) % 16
        return zeros
    if f"{module}.weight_zero_point" not in made.stored:
        return None
    words = made.stored[f"{module}.weight_zero_point"].numpy().astype(np.int64)
    return np.stack([(words[o // 8] >> (4 * (o % 8))) % 16 for o in range(len(words) * 8)])


@needs_plugin
@pytest.mark.parametrize("form", FORMS)
def test_codes_zeros_and_scales_are_in_the_bundle_bit_for_bit(made: Make, tmp_path: Path, form: str) -> None:
    quantizer, config, said, format = FORMS[form]
    checkpoint = made(quantizer, config)
    precision = f"int{format.bits}"
    plan = plan_of(checkpoint.path, precision, mtp=False)
    assert outcome(plan) == {f"kept: {said}": 9 + 4 + 12}
    assert sum(f"kept: {said}" in line for line in plan.notes) == 3
    bundle = build(checkpoint.path, tmp_path / "bundle", precision=precision, max_context=64, mtp=False)
    matrices = stored_bytes(bundle)
    layers = {
        "layers.0.linear_attn.in_proj": ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"],
        "layers.0.linear_attn.out_proj": ["linear_attn.out_proj"],
        "layers.1.mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "layers.2.mlp.down_proj": ["mlp.down_proj"],
        "layers.3.self_attn.o_proj": ["self_attn.o_proj"],
    }
    for prefix, modules in layers.items():
        (raw,) = [raw for name, raw in matrices.items() if name.startswith(prefix)]
        names = [f"{PREFIX}{prefix.split('.')[0]}.{prefix.split('.')[1]}.{module}" for module in modules]
        values = np.concatenate([checkpoint.values[f"{name}.weight"].numpy() for name in names])
        codes, scales, zeros = unpack(format, raw, *values.shape)
        np.testing.assert_array_equal(dequantize(format, codes, scales, zeros), values)
        repeat = scales.shape[1] // stored_scales(checkpoint, names[0]).shape[1]
        wanted = torch.cat([stored_scales(checkpoint, name) for name in names]).repeat_interleave(repeat, 1)
        assert scales.dtype == (np.float32 if format.wide_scales else np.float16)
        np.testing.assert_array_equal(scales, wanted.float().numpy().astype(scales.dtype))
        if zeros is not None:
            stored = [stored_zeros(checkpoint, name) for name in names]
            np.testing.assert_array_equal(zeros, np.concatenate([z for z in stored if z is not None]))
    entries = load_manifest(bundle).precision_plan
    assert entries["mlp stored quantized"] == f"12 kept: {said}"
    assert "25 weights, 25 kept" in entries.values()


@needs_plugin
@pytest.mark.parametrize("form", ["packed-asymmetric"])
def test_a_bundle_computes_what_the_dequantized_model_does(made: Make, tmp_path: Path, form: str) -> None:
    """Only the rounding of activations to 8 bits is left between them."""
    checkpoint = made(*FORMS[form][:2])
    bundle = build(checkpoint.path, tmp_path / "bundle", precision="int4", max_context=128)
    result = verify(bundle, checkpoint.path)
    assert result["passed"], result


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["gptq", "awq", "packed-asymmetric"])
def test_a_cuda_bundle_computes_what_the_dequantized_model_does(made_square: Make, tmp_path: Path, form: str) -> None:
    checkpoint = made_square(*FORMS[form][:2])
    bundle = build(checkpoint.path, tmp_path / "bundle", device="cuda", precision="int4", max_context=128)
    result = verify(bundle, checkpoint.path)
    assert result["passed"], result


@needs_plugin
def test_experts_one_by_one(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "linear_value_head_dim": 32}
    config = tiny_config(moe=True, vision=False, num_experts=8, num_experts_per_tok=2, **sizes)
    tokenizer = write_tiny_tokenizer(tmp_path / "tokenizer")
    plain = synthesize(config, tmp_path / "source", fused_experts=False, tokenizer=tokenizer)
    checkpoint = quantize_checkpoint(plain, tmp_path / "made", quantizers.gptq(128, symmetric=False), GPTQ | {"sym": False})
    plan = plan_of(checkpoint.path, mtp=False)
    assert plan.quantization is not None
    assert plan.quantization.outcome["experts"] == {"kept: gptq int4 group 128 zeros": 4 * 8 * 3}
    bundle = build(checkpoint.path, tmp_path / "bundle", precision="int4", max_context=128, mtp=False)
    raw = {name: raw for name, raw in stored_bytes(bundle).items() if name.startswith("layers.1.mlp.experts.")}
    (gate_up,), (down,) = ([raw[name] for name in raw if part in name] for part in ("gate_up_proj", "down_proj"))
    format = QuantFormat(4, 128, zeros=True)
    for e in range(8):
        gate, up, back = (checkpoint.values[f"{PREFIX}layers.1.mlp.experts.{e}.{n}_proj.weight"].numpy() for n in ("gate", "up", "down"))
        np.testing.assert_array_equal(dequantize(format, *unpack(format, gate_up[e], 256, 128)), np.concatenate([gate, up]))
        np.testing.assert_array_equal(dequantize(format, *unpack(format, down[e], 128, 128)), back)
    ids = np.random.default_rng(0).integers(0, 480, 40).tolist()
    expected = EagerSequence(load_decoder(open_checkpoint(checkpoint.path)), 64).read(ids)
    error = load(bundle).decoder().read(ids) - expected
    # Rounding makes a random router choose another expert for a token now and then: its row is off, most are not.
    assert np.median(np.sqrt((error * error).mean(axis=1))) < 0.15 * expected.std()


def test_what_has_no_grid_is_dequantized_and_the_plan_says_so(made: Make) -> None:
    act_order = made(quantizers.gptq(32, act_order=True), GPTQ | {"desc_act": True, "group_size": 32})
    assert outcome(plan_of(act_order.path)) == {
        "gptq int4 group 32, dequantized to int4 block 32 search (no integers in order along its rows)": 32
    }


def test_order_that_only_the_file_tells(made: Make, tmp_path: Path) -> None:
    """desc_act is false, and g_idx says otherwise: known when the weights are read."""
    checkpoint = made(quantizers.gptq(128, act_order=True), GPTQ)
    with pytest.raises(CheckpointError, match=r"no grid along its rows.*keep = false"):
        build(checkpoint.path, tmp_path / "bundle", precision="int4", max_context=64)


def test_fp8_is_dequantized(made: Make) -> None:
    fp8 = made(quantizers.block_fp8(), {"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert list(outcome(plan_of(fp8.path))) == ["fp8 128x128, dequantized to int4 block 32 search (no integers in order along its rows)"]


def test_gate_and_up_of_two_grids(made: Make) -> None:
    """One product reads both: where up_proj is not quantized, gate_proj is not kept either."""
    chosen = re.compile(PROJECTIONS.pattern.replace("(gate|up|down)_proj", "(gate|down)_proj"))
    plan = plan_of(made(quantizers.gptq(128), GPTQ, chosen).path)
    assert plan.quantization is not None
    assert plan.quantization.outcome["mlp"] == {
        "kept: gptq int4 group 128": 4,
        "gptq int4 group 128, dequantized to int4 block 32 search (beside others of another grid)": 4,
    }


@pytest.mark.skipif(find_library("cpu") is None, reason="needs the plugin's kernels in the choice")
def test_a_stack_is_cut_where_the_grid_changes(made: Make) -> None:
    chosen = re.compile(PROJECTIONS.pattern.replace("|in_proj_z", ""))
    checkpoint = open_checkpoint(made(quantizers.gptq(128), GPTQ, chosen).path)
    graph = lower(checkpoint, plan_build(checkpoint, precision="int4"))["decoder"].graph
    blocks = [[part.producer().attributes.get_int("block") for part in node.inputs] for node in graph if node.op_type == "Concat"]
    assert blocks == [[128, 32]] * 3


@pytest.mark.parametrize(
    ("precision", "text", "what"),
    [
        ("int8", "", "kept: gptq int4 group 128"),
        ("int4", "[mlp]\nkeep = false", "gptq int4 group 128, dequantized to int4 block 32 search again (the plan has keep = false)"),
        ("int4", '[mlp]\nformat = "stored"', "gptq int4 group 128, dequantized (the plan quantizes nothing here)"),
    ],
)
def test_what_a_plan_can_ask_for(made: Make, tmp_path: Path, precision: str, text: str, what: str) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(text)
    plan = plan_of(made(quantizers.gptq(128), GPTQ).path, precision, plan_file=file)
    assert plan.quantization is not None and plan.quantization.outcome["mlp"] == {what: 12}


def test_the_default_precision_is_the_checkpoints(made: Make, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.write_bytes(b"kernels")
    for known in LIBRARIES.values():
        monkeypatch.setenv(known.variable, str(library))
    quantized = open_checkpoint(made(quantizers.gptq(128), GPTQ).path)
    assert default_precision(quantized, "onnxruntime", "cpu") == "int4"
    assert default_precision(quantized, "onnx", "cpu") == "int4"
    assert default_precision(open_checkpoint(source), "onnxruntime", "cpu") == "fp32"
    assert default_precision(open_checkpoint(source), "onnxruntime", "cuda") == "fp16"
    monkeypatch.setenv(LIBRARIES["cpu"].variable, "")
    assert default_precision(quantized, "onnxruntime", "cpu") == "fp32"


def test_cuda_keeps_the_same(made_square: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.write_bytes(b"kernels")
    monkeypatch.setenv(LIBRARIES["cuda"].variable, str(library))
    checkpoint = open_checkpoint(made_square(*FORMS["packed-asymmetric"][:2]).path)
    plan = plan_build(checkpoint, device="cuda", precision="int4")
    assert outcome(plan) == {"kept: compressed-tensors int4 group 32 zeros": 32}
    for node in lower(checkpoint, plan)["decoder"].graph:
        if node.op_type == "QuantSwiGlu":
            assert [node.attributes.get_int(name) for name in ("bits", "block", "zeros", "wide_scales")] == [4, 32, 1, 1]


def test_inspect_tells_what_is_kept(made: Make) -> None:
    report = inspect_checkpoint(made(quantizers.gptq(128), GPTQ).path)
    (entry,) = [
        entry for entry in report["targets"] if (entry["target"], entry["device"], entry["precision"]) == ("onnxruntime", "cpu", "int4")
    ]
    assert not entry["supported"] or entry["quantized_matrices"] == {"kept: gptq int4 group 128": 32}
    assert json.dumps(report)


@pytest.mark.parametrize(
    ("group", "columns", "block"),
    [(32, 256, 32), (96, 288, 32), (128, 256, 128), (192, 384, 64), (1000, 1000, 128), (16, 256, None), (48, 96, None)],
)
def test_blocks_lie_in_groups(group: int, columns: int, block: int | None) -> None:
    assert block_of(Grid(4, group, True, "F16"), columns) == block
