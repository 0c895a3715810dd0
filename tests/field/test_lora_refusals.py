"""Adapters that cannot be merged: one message each, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_export.errors import QwenExportError
from qwen_export.graphs.checkpoint.adapters.merge_adapters import adapter_source
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from tests.support.adapters import write_adapter
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize

UP = {"layers.0.mlp.up_proj": (96, 64)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tiny_config(vision=False), tmp_path_factory.mktemp("tiny") / "checkpoint")


def refused(source: Path, adapter: Path | str, message: str) -> None:
    with pytest.raises(QwenExportError, match=message) as caught:
        open_checkpoint(source, adapters=[adapter_source(adapter)])
    assert caught.value.fix


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "of this kind.*'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "base weights that its training has changed.*pissa"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_alpha": "much"}, "'lora_alpha'"),
        ({"alpha_pattern": {"(": 4}}, "'alpha_pattern'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_not_merged(source: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    refused(source, write_adapter(tmp_path / "adapter", UP, **config), message)


def changed(adapter: Path, change: Any) -> Path:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(change(tensors), adapter / "adapter_model.safetensors")
    return adapter


def without_b(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if "lora_B" not in name}


def with_bias(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {"base_model.model.model.layers.0.mlp.up_proj.lora_B.bias": np.zeros(96, np.float32)}


def with_tokens(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {"base_model.model.lm_head.weight": np.zeros((520, 64), np.float32)}


def in_doubles(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: value.astype(np.float64) for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_b, "one of its two matrices"),
        (with_bias, r"not merged.*lora_B\.bias"),
        (with_tokens, r"another shape.*\(520, 64\)"),
        (in_doubles, "F64"),
        (lambda tensors: {}, "no tensors"),
    ],
    ids=["half", "bias", "new tokens", "doubles", "empty"],
)
def test_files_that_are_not_merged(source: Path, tmp_path: Path, change: Any, message: str) -> None:
    refused(source, changed(write_adapter(tmp_path / "adapter", UP), change), message)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"layers.0.mlp.up_proj": (96, 128)}, r"do not fit the checkpoint.*got 128 inputs and 96 outputs, expected \(64, 96\)"),
        ({"layers.7.mlp.up_proj": (96, 64)}, "does not have"),
        ({"layers.0.mlp.experts": (64, 64)}, "do not fit the checkpoint"),
        ({"layers.0.mlp.experts.3.up_proj": (64, 64)}, "does not|do not fit"),
        ({"layers.0.linear_attn.conv1d": (96, 64)}, "does not have"),
    ],
    ids=["sizes", "layer", "experts", "expert", "convolution"],
)
def test_adapters_of_another_model(source: Path, tmp_path: Path, modules: dict[str, tuple[int, int]], message: str) -> None:
    refused(source, write_adapter(tmp_path / "adapter", modules), message)


def test_directories_that_are_no_adapters(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path / "nothing", r"not the directory of an adapter.*\{?lora")
    refused(source, source, "not the directory of an adapter")
    refused(source, f"{source}:1e9", "not a usable number")
    pickled = write_adapter(tmp_path / "pickled", UP)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(source, pickled, "a pickle")
    (pickled / "adapter_model.bin").unlink()
    refused(source, pickled, "missing")


def test_a_damaged_configuration(source: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", UP)
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 4})[:-1])
    refused(source, adapter, "not valid JSON")
