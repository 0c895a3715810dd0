"""Checkpoints that are quantized already: read exactly as their format defines, or refused with a sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5ForConditionalGeneration

from qwen_export.building.build_plan import plan_build
from qwen_export.building.compiler import build
from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.errors import CheckpointError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.formats.logical_tensor import GridRows
from qwen_export.graphs.checkpoint.tensor_names import check_tensors, decoder_tensors, stored_name
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import load
from tests.support import quantizers
from tests.support.family import tiny_config
from tests.support.quantization_forms import FORMS, ON_A_GRID
from tests.support.quantizers import QuantizedCheckpoint, quantize_checkpoint
from tests.support.synthesize import synthesize

FP8, INT8 = torch.float8_e4m3fn, torch.int8
MODULE = "model.language_model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every projection has a multiple of 128 inputs."""
    config = tiny_config(hidden_size=256, intermediate_size=384, linear_key_head_dim=32, linear_value_head_dim=32)
    return synthesize(config, tmp_path_factory.mktemp("wide") / "checkpoint")


@pytest.fixture(scope="module")
def quantized(wide_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], QuantizedCheckpoint]:
    """The checkpoint in one of FORMS, made once."""
    made: dict[str, QuantizedCheckpoint] = {}

    def make(form: str) -> QuantizedCheckpoint:
        if form not in made:
            quantizer, config, _ = FORMS[form]
            made[form] = quantize_checkpoint(wide_checkpoint, tmp_path_factory.mktemp(form), quantizer, config)
        return made[form]

    return make


Make = Callable[[str], QuantizedCheckpoint]


@pytest.fixture
def damaged(quantized: Make, tmp_path: Path) -> Callable[..., Path]:
    """A copy with some stored tensors replaced; None removes one."""

    def make(form: str, config: dict[str, Any] | None = None, **changes: torch.Tensor | None) -> Path:
        path = Path(shutil.copytree(quantized(form).path, tmp_path / "damaged"))
        tensors = load_file(path / "model.safetensors")
        for suffix, tensor in changes.items():
            if tensor is None:
                del tensors[f"{MODULE}.{suffix}"]
            else:
                tensors[f"{MODULE}.{suffix}"] = tensor
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
        if config is not None:
            settings = json.loads((path / "config.json").read_text())
            settings["quantization_config"].update(config)
            (path / "config.json").write_text(json.dumps(settings))
        return path

    return make


# What is read


@pytest.mark.parametrize("form", FORMS)
def test_every_row_is_what_the_format_defines(quantized: Make, form: str) -> None:
    made = quantized(form)
    checkpoint = open_checkpoint(made.path)
    check_tensors(checkpoint)
    with CheckpointReader(checkpoint) as reader:
        for name, shape in decoder_tensors(checkpoint.config.text):
            stored = stored_name(checkpoint.config, name)
            np.testing.assert_array_equal(reader.rows(name, 0, shape[0]), made.values[stored].numpy(), err_msg=name)
            for start, stop in ((0, 1), (shape[0] // 3, shape[0] // 3 + 1), (shape[0] // 2 + 1, shape[0])):
                if start < stop:
                    np.testing.assert_array_equal(reader.rows(name, start, stop), made.values[stored].numpy()[start:stop], err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_inspect_says_how_the_weights_are_stored(quantized: Make, form: str) -> None:
    report = inspect_checkpoint(quantized(form).path)
    plain = inspect_checkpoint(quantized(form).plain)
    assert FORMS[form][2] in report["quantization"] and FORMS[form][1]["quant_method"] in report["quantization"]
    assert report["parts"]["text"]["parameters"] == plain["parts"]["text"]["parameters"]
    assert report["targets"][0]["supported"]


@pytest.mark.parametrize("form", ON_A_GRID)
def test_codes_are_the_checkpoints_own(quantized: Make, form: str) -> None:
    """The grid is given bit for bit: symmetric weights have no zero points, and the values are those of `rows`."""
    made = quantized(form)
    checkpoint = open_checkpoint(made.path)
    name = MODULE.removeprefix("model.language_model.") + ".weight"
    with CheckpointReader(checkpoint) as reader:
        rows = checkpoint.weights[f"{MODULE}.weight"].shape[0]
        for start, stop in ((0, rows), (5, 19)):
            codes = reader.codes(name, start, stop)
            grid = reader.grid(name)
            assert isinstance(codes, GridRows) and grid is not None
            assert (codes.bits, codes.group, codes.zeros is None) == (grid.bits, grid.group, grid.symmetric)
            assert grid.scales == ("BF16" if "packed" in form else "F16")
            assert codes.codes.dtype == np.uint8 and codes.codes.max() <= 15
            assert (codes.zeros is None) == ("asymmetric" not in form and form != "awq")
            zeros = np.float32(8) if codes.zeros is None else np.repeat(codes.zeros, codes.group, axis=1).astype(np.float32)
            values = (codes.codes.astype(np.float32) - zeros) * np.repeat(codes.scales, codes.group, axis=1)
            np.testing.assert_array_equal(values, made.values[f"{MODULE}.weight"].numpy()[start:stop])
            np.testing.assert_array_equal(codes.values(), values)


@pytest.mark.parametrize("form", ["fp8", "nvfp4", "gptq-act-order"])
def test_weights_without_a_grid_along_their_rows_have_no_codes(quantized: Make, form: str) -> None:
    with CheckpointReader(open_checkpoint(quantized(form).path)) as reader:
        assert reader.grid("layers.0.mlp.up_proj.weight") is None
        assert reader.codes("layers.0.mlp.up_proj.weight", 0, 4) is None
        assert reader.codes("layers.0.input_layernorm.weight", 0, 4) is None


def test_modelopt_settings_beside_config_json(quantized: Make, tmp_path: Path) -> None:
    path = Path(shutil.copytree(quantized("nvfp4-modelopt").path, tmp_path / "checkpoint"))
    settings = json.loads((path / "config.json").read_text())
    del settings["quantization_config"]
    (path / "config.json").write_text(json.dumps(settings))
    (path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}))
    checkpoint = open_checkpoint(path)
    check_tensors(checkpoint)
    assert checkpoint.weights[f"{MODULE}.weight"].storage == "nvfp4"


def test_experts_one_by_one(tmp_path: Path) -> None:
    """Quantized releases have a matrix per expert, which appear under their plain names."""
    config = tiny_config(
        moe=True, hidden_size=128, moe_intermediate_size=256, shared_expert_intermediate_size=128, linear_value_head_dim=32
    )
    source = synthesize(config, tmp_path / "source", fused_experts=False)
    made = quantize_checkpoint(source, tmp_path / "out", FORMS["fp8"][0], FORMS["fp8"][1])
    weights = open_checkpoint(made.path).weights
    assert set(weights) == set(made.values)
    assert weights["model.language_model.layers.0.mlp.experts.7.down_proj.weight"].storage == "fp8 128x128"
    assert weights["model.language_model.layers.0.mlp.gate.weight"].storage == "bf16"


def test_experts_in_one_tensor(quantized: Make, tmp_path: Path) -> None:
    """[E, O, I] with scales [E, O/128, I/128], as transformers names them."""
    matrices = torch.randn(3, 160, 256)
    scale = torch.stack([quantizers.blocks_of(matrix, 128, 128) / 448 for matrix in matrices])
    each = torch.stack([quantizers.spread(grid, 128, 128, matrices[0].shape) for grid in scale])
    codes = (matrices / each).to(FP8)
    path = Path(shutil.copytree(quantized("fp8").path, tmp_path / "checkpoint"))
    name = "model.language_model.experts.gate_up_proj"
    stored = load_file(path / "model.safetensors")
    save_file(stored | {name: codes, name + "_scale_inv": scale}, path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    with CheckpointReader(checkpoint) as reader:
        np.testing.assert_array_equal(reader.rows("experts.gate_up_proj", 1, 3), (codes.float() * each)[1:].numpy())


def test_what_transformers_quantizes_itself(tmp_path: Path) -> None:
    """FP8 tensors made by transformers' own converter."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

    class Quantizer:
        quantization_config = transformers.FineGrainedFP8Config(weight_block_size=(128, 128))

    convert, back = fp8.Fp8Quantize(Quantizer()), fp8.Fp8Dequantize(Quantizer())

    def quantize(module: str, matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        parts = convert.convert({f"{module}.weight": matrix})
        assert len(parts) == 2
        return parts, back._dequantize_one(parts[f"{module}.weight"], parts[f"{module}.weight_scale_inv"], torch.float32)

    config = tiny_config(hidden_size=256, intermediate_size=384, linear_key_head_dim=128, linear_value_head_dim=128)
    made = quantize_checkpoint(synthesize(config, tmp_path / "source"), tmp_path / "out", quantize, FORMS["fp8"][1])
    assert_reads(made)


def test_what_compressed_tensors_packs(wide_checkpoint: Path, tmp_path: Path) -> None:
    """int4 and NVFP4 tensors made and unmade by the compressed-tensors library."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def library(compressor: Any, args: Any, scales: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> quantizers.Quantizer:
        scheme = QuantizationScheme(targets=["Linear"], weights=args)

        def quantize(module: str, matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
            parts = compressor.compress({"weight": matrix, **scales(matrix)}, scheme)
            value = compressor.decompress(dict(parts), scheme)["weight"]
            return {f"{module}.{key}": tensor for key, tensor in parts.items()}, value.float()

        return quantize

    def asymmetric(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        _, scale, zero = quantizers.integer_grid(matrix, 64, False, torch.float32)
        return {"weight_scale": scale, "weight_zero_point": (zero - 8).to(torch.int8)}

    def fp4(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        divisor = (6 * 448 / matrix.abs().max()).reshape(1)
        scale = matrix.reshape(matrix.shape[0], -1, 16).abs().amax(-1) / 6 * divisor
        return {"weight_scale": scale.to(FP8).float(), "weight_global_scale": divisor}

    int4_args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=64)
    fp4_args = QuantizationArgs(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    packed = library(PackedQuantizationCompressor, int4_args, asymmetric)
    assert_reads(quantize_checkpoint(wide_checkpoint, tmp_path / "int4", packed, FORMS["packed-asymmetric"][1]))
    # The library gives NVFP4 back in bf16.
    packed = library(NVFP4PackedCompressor, fp4_args, fp4)
    assert_reads(quantize_checkpoint(wide_checkpoint, tmp_path / "nvfp4", packed, FORMS["nvfp4"][1]), rtol=2**-7)


def assert_reads(made: QuantizedCheckpoint, rtol: float = 0.0) -> None:
    checkpoint = open_checkpoint(made.path)
    check_tensors(checkpoint)
    with CheckpointReader(checkpoint) as reader:
        for name, shape in decoder_tensors(checkpoint.config.text):
            expected = made.values[stored_name(checkpoint.config, name)].numpy()
            np.testing.assert_allclose(reader.rows(name, 0, shape[0]), expected, rtol=rtol, atol=0, err_msg=name)


# What is refused


@pytest.mark.parametrize(
    ("form", "scale"),
    [
        *(("fp8", "weight_scale_inv"), ("gptq", "scales"), ("gptq-act-order", "scales"), ("awq", "scales"), ("packed", "weight_scale")),
        *(
            ("nvfp4", "weight_scale"),
            ("nvfp4", "weight_global_scale"),
            ("nvfp4-modelopt", "weight_scale_2"),
            ("int8-channel", "weight_scale"),
        ),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_no_model_can_use(quantized: Make, damaged: Callable[..., Path], form: str, scale: str, value: float) -> None:
    stored = quantized(form).stored[f"{MODULE}.{scale}"]
    values = stored.float().contiguous().clone()
    values.view(-1)[-1] = value
    if stored.dtype == FP8 and value == float("inf"):
        pytest.skip("FP8 E4M3 has no infinity")
    checkpoint = open_checkpoint(damaged(form, **{scale: values.to(stored.dtype)}))
    with CheckpointReader(checkpoint) as reader, pytest.raises(CheckpointError, match=rf"scales.*{re.escape(MODULE)}\.{scale}"):
        reader.rows("layers.0.mlp.up_proj.weight", 0, 384)


@pytest.mark.parametrize(
    ("form", "missing"),
    [
        *(("fp8", "weight_scale_inv"), ("gptq", "scales"), ("gptq", "qzeros"), ("gptq-act-order", "g_idx"), ("awq", "scales")),
        *(("awq", "qzeros"), ("packed", "weight_scale"), ("nvfp4", "weight_scale"), ("nvfp4", "weight_global_scale")),
        *(("nvfp4-modelopt", "weight_scale_2"), ("nvfp4-modelopt", "weight_scale"), ("fp8-channel", "weight_scale")),
        *(("fp8-block", "weight_scale"), ("int8-channel", "weight_scale")),
    ],
)
def test_a_part_that_is_missing(damaged: Callable[..., Path], form: str, missing: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{MODULE}.{missing}")):
        plan_build(open_checkpoint(damaged(form, **{missing: None})))


@pytest.mark.parametrize(
    ("form", "lost"),
    [("fp8", "weight"), ("gptq", "qweight"), ("awq", "qweight"), ("packed", "weight_packed"), ("nvfp4-modelopt", "weight")],
)
def test_a_scale_without_its_weight(damaged: Callable[..., Path], form: str, lost: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(MODULE)):
        plan_build(open_checkpoint(damaged(form, **{lost: None})))


@pytest.mark.parametrize(
    ("form", "part"),
    [
        *(("fp8", "weight_scale_inv"), ("gptq", "scales"), ("gptq", "qzeros"), ("gptq", "g_idx"), ("awq", "qzeros"), ("awq", "scales")),
        *(
            ("packed", "weight_scale"),
            ("packed-asymmetric", "weight_zero_point"),
            ("nvfp4", "weight_scale"),
            ("fp8-channel", "weight_scale"),
        ),
    ],
)
def test_a_part_of_the_wrong_shape(quantized: Make, damaged: Callable[..., Path], form: str, part: str) -> None:
    stored = quantized(form).stored[f"{MODULE}.{part}"]
    with pytest.raises(CheckpointError, match=re.escape(f"{MODULE}")):
        plan_build(open_checkpoint(damaged(form, **{part: stored[:-1].contiguous()})))


@pytest.mark.parametrize(
    ("form", "change", "mention"),
    [
        ("fp8", {"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ("fp8", {"fmt": "e5m2"}, "'e5m2'"),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin'"),
        ("awq", {"version": "gemv"}, "'gemv'"),
        ("packed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ("packed", {"format": "marlin-24"}, "'marlin-24'"),
        ("nvfp4-modelopt", {"quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
    ],
)
def test_variants_that_are_not_read(damaged: Callable[..., Path], form: str, change: dict[str, Any], mention: str) -> None:
    """Refused by `build` with one message; `inspect` shows the checkpoint all the same."""
    path = damaged(form, config=change)
    with pytest.raises(UnsupportedError, match=re.escape(mention)) as raised:
        plan_build(open_checkpoint(path))
    assert "not supported" in str(raised.value)
    assert mention.strip("'") in inspect_checkpoint(path)["targets"][0]["why"]


def test_a_group_that_does_not_exist(quantized: Make, damaged: Callable[..., Path]) -> None:
    order = quantized("gptq").stored[f"{MODULE}.g_idx"].clone()
    order[3] = 99
    with CheckpointReader(open_checkpoint(damaged("gptq", g_idx=order))) as reader, pytest.raises(CheckpointError, match=r"g_idx.*99"):
        reader.rows("layers.0.mlp.up_proj.weight", 0, 4)


def test_zero_points_of_another_variant(damaged: Callable[..., Path]) -> None:
    """Version 2 stores zero points as they are: read as version 1, every weight would be off by one."""
    path = damaged("gptq-v2", config={"checkpoint_format": "gptq"})
    with CheckpointReader(open_checkpoint(path)) as reader, pytest.raises(CheckpointError, match=r"zero points.*got 9, expected 8"):
        reader.rows("layers.0.mlp.up_proj.weight", 0, 4)


def test_fp8_codes_that_are_not_numbers(quantized: Make, damaged: Callable[..., Path]) -> None:
    codes = quantized("fp8").stored[f"{MODULE}.weight"].clone()
    codes.view(torch.uint8)[7, 9] = 0x7F
    name = rf"not finite.*{re.escape(MODULE)}\.weight"
    with CheckpointReader(open_checkpoint(damaged("fp8", weight=codes))) as reader, pytest.raises(CheckpointError, match=name):
        reader.rows("layers.0.mlp.up_proj.weight", 0, 16)


# From end to end


@pytest.mark.parametrize("form", ["fp8", "gptq", "awq"])
def test_a_bundle_computes_what_the_dequantized_model_does(quantized: Make, tmp_path: Path, form: str) -> None:
    made = quantized(form)
    bundle = build(made.path, tmp_path / "bundle", max_context=64)
    transformers.utils.logging.disable_progress_bar()
    reference = Qwen3_5ForConditionalGeneration.from_pretrained(str(made.plain), dtype=torch.float32, local_files_only=True).eval()
    ids = np.random.default_rng(0).integers(0, 480, 40).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    assert expected.std() > 0.2
    assert float(np.abs(load(bundle).decoder().read(ids) - expected).max()) <= 1e-4
    assert any(FORMS[form][2] in what for what in load_manifest(bundle).precision_plan)
