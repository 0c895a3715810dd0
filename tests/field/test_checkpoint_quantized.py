"""Quantization that is decided per module: AutoRound, mixed bits, scales per row. The values are those of the quantizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_export.building.build_plan import plan_build
from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.errors import CheckpointError, QwenExportError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.formats.format_table import storage_summary
from tests.support import quantizers
from tests.support.checkpoint_forms import MIXED, auto_round, int4
from tests.support.family import tiny_config
from tests.support.quantizers import QuantizedCheckpoint, quantize_checkpoint
from tests.support.synthesize import synthesize

MODULE = "model.language_model.layers.0.mlp.down_proj"
PREFIX = "model.language_model."


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every projection has a multiple of 128 inputs."""
    config = tiny_config(hidden_size=128, intermediate_size=256, linear_key_head_dim=32, linear_value_head_dim=32)
    return synthesize(config, tmp_path_factory.mktemp("wide") / "checkpoint", with_mtp=False)


@pytest.fixture
def quantized(wide: Path, tmp_path: Path) -> Callable[..., QuantizedCheckpoint]:
    return lambda quantizer, config: quantize_checkpoint(wide, tmp_path, quantizer, config)


@pytest.mark.parametrize("form", MIXED)
def test_every_module_has_its_own_form(quantized: Callable[..., QuantizedCheckpoint], form: str) -> None:
    tried = MIXED[form]
    made = quantized(tried.quantizer, tried.config)
    checkpoint = open_checkpoint(made.path)
    plan_build(checkpoint, mtp=False)
    forms = storage_summary(checkpoint.weights)
    for wanted in tried.becomes:
        assert any(found.startswith(wanted) for found in forms), forms
    with CheckpointReader(checkpoint) as reader:
        for name, values in made.values.items():
            if name.startswith(PREFIX) and name.endswith("_proj.weight"):
                got = reader.rows(name.removeprefix(PREFIX), 0, len(values))
                np.testing.assert_allclose(got, values.numpy(), rtol=2e-7, err_msg=name)


def test_rows_that_do_not_fill_their_last_word(quantized: Callable[..., QuantizedCheckpoint], tmp_path: Path) -> None:
    """weight_shape has the inputs; a word has 8."""
    matrix = torch.randn(16, 20)
    parts, values = quantizers.pack_quantized(-1)("model.language_model.layers.0.mlp.odd_proj", matrix)
    made = quantized(MIXED["packed mixed"].quantizer, MIXED["packed mixed"].config)
    tensors = load_file(made.path / "model.safetensors")
    save_file({**tensors, **{name: part.contiguous() for name, part in parts.items()}}, made.path / "model.safetensors")
    with CheckpointReader(open_checkpoint(made.path)) as reader:
        np.testing.assert_allclose(reader.rows("layers.0.mlp.odd_proj.weight", 0, 16), values.numpy(), rtol=2e-7)


@pytest.mark.parametrize("scale", ["scales", "weight_scale", "weight_scale_inv"])
def test_groups_of_zeros_are_read(quantized: Callable[..., QuantizedCheckpoint], scale: str) -> None:
    """Layers that block expansion added are zeros, and some tools store a scale of zero for them."""
    quantizer, config = {
        "scales": (quantizers.gptq(128), int4(quant_method="gptq")),
        "weight_scale": (MIXED["mixed precision"].quantizer, MIXED["mixed precision"].config),
        "weight_scale_inv": (quantizers.block_fp8(), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    }[scale]
    made = quantized(quantizer, config)
    tensors = load_file(made.path / "model.safetensors")
    tensors[f"{MODULE}.{scale}"] = torch.zeros_like(tensors[f"{MODULE}.{scale}"])
    save_file(tensors, made.path / "model.safetensors")
    with CheckpointReader(open_checkpoint(made.path)) as reader:
        assert not reader.rows("layers.0.mlp.down_proj.weight", 0, 128).any()


# What is refused, with the module


def three_bits(module: str, matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The shapes of a GPTQ module of 3 bits."""
    O, I = matrix.shape  # noqa: E741
    shapes = {"qweight": (I * 3 // 32, O), "qzeros": (I // 128, O * 3 // 32)}
    parts = {f"{module}.{name}": torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    return parts | {f"{module}.scales": torch.ones(I // 128, O, dtype=torch.float16)}, matrix


def unequal(module: str, matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Three scales for 256 inputs."""
    parts, values = quantizers.gptq(128)(module, matrix)
    if parts[f"{module}.scales"].shape[0] == 2:
        for name in ("scales", "qzeros"):
            parts[f"{module}.{name}"] = torch.cat([parts[f"{module}.{name}"], parts[f"{module}.{name}"][:1]])
    return parts, values


def reordered(module: str, matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    parts, values = quantizers.pack_quantized(128)(module, matrix)
    return parts | {f"{module}.weight_g_idx": torch.arange(matrix.shape[1], dtype=torch.int32)}, values


def only_down(odd: quantizers.Quantizer, rest: quantizers.Quantizer) -> quantizers.Quantizer:
    return quantizers.by_module((r"layers\.0\.mlp\.down_proj", odd), (".", rest))


REFUSED: dict[str, tuple[quantizers.Quantizer, dict[str, Any], str]] = {
    "3 bits": (only_down(three_bits, quantizers.gptq(128)), int4(quant_method="gptq"), "3 bits"),
    "unequal groups": (only_down(unequal, quantizers.gptq(128)), int4(quant_method="gptq"), "3 scales for a row of 256 inputs"),
    "zero points in a symmetric module": (
        only_down(quantizers.gptq(128, symmetric=False), quantizers.gptq(128, g_idx=False)),
        auto_round(),
        "zero points that are not in the middle",
    ),
    "another order of inputs": (only_down(reordered, quantizers.pack_quantized(128)), MIXED["packed mixed"].config, "actorder"),
    "5 bits": (only_down(quantizers.pack_quantized(-1, bits=16), quantizers.pack_quantized(-1)), MIXED["packed mixed"].config, "words"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_module(quantized: Callable[..., QuantizedCheckpoint], case: str) -> None:
    quantizer, config, mention = REFUSED[case]
    made = quantized(quantizer, config)
    checkpoint = open_checkpoint(made.path)
    with pytest.raises(QwenExportError, match=mention) as raised, CheckpointReader(checkpoint) as reader:
        plan_build(checkpoint, mtp=False)
        reader.rows("layers.0.mlp.down_proj.weight", 0, 128)
    assert MODULE in str(raised.value)


@pytest.mark.parametrize("packing", ["auto_round:marlin", "auto_round:rrq", 7])
def test_packings_that_are_not_known(wide: Path, tmp_path: Path, packing: object) -> None:
    made = quantize_checkpoint(wide, tmp_path, quantizers.gptq(128, g_idx=False), auto_round() | {"packing_format": packing})
    with pytest.raises(UnsupportedError, match=r"packing_format.*auto_round:auto_gptq"):
        plan_build(open_checkpoint(made.path))
    assert "packing_format" in inspect_checkpoint(made.path, targets=("onnxruntime",))["targets"][0]["why"]


@pytest.mark.parametrize(
    "settings",
    [
        {"dynamic": ["a"]},
        {"dynamic": {"(" * 500: {"bits": 8}, "(a+)+$": {"sym": False}}},
        {"group_size": {"a": 1}},
        {"sym": "yes"},
        {"desc_act": 5},
        {"checkpoint_format": ["gptq"]},
    ],
)
def test_hostile_settings_give_one_message_or_are_read(wide: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    made = quantize_checkpoint(wide, tmp_path, quantizers.gptq(128), int4(quant_method="gptq") | settings)
    try:
        checkpoint = open_checkpoint(made.path)
        plan_build(checkpoint, mtp=False)
    except (CheckpointError, UnsupportedError) as error:
        assert len(str(error)) < 2000
        return
    with CheckpointReader(checkpoint) as reader:
        wanted = made.values[f"{MODULE}.weight"].numpy()
        np.testing.assert_allclose(reader.rows("layers.0.mlp.down_proj.weight", 0, len(wanted)), wanted, rtol=2e-7)


def test_settings_are_read_from_the_files_of_the_quantizer(wide: Path, tmp_path: Path) -> None:
    """ModelOpt may write its settings into a file of its own."""
    tried = MIXED["modelopt mixed"]
    made = quantize_checkpoint(wide, tmp_path, tried.quantizer, tried.config)
    config = json.loads((made.path / "config.json").read_text())
    del config["quantization_config"]
    (made.path / "config.json").write_text(json.dumps(config))
    (made.path / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": {"quant_algo": "MIXED_PRECISION"}}))
    assert "nvfp4" in storage_summary(open_checkpoint(made.path).weights)
