"""Which files of a checkpoint directory count: transformers' precedence, what is ignored, and directories that are no model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.tensor_names import check_tensors, has_mtp
from tests.support.family import tiny_config

Make = Callable[..., Path]
NORM = "model.language_model.norm.weight"


def as_one_file(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Replace the shards and their index by `model.safetensors`; returns what it holds."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (checkpoint / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    return tensors


def norm(checkpoint: Path) -> np.ndarray:
    with CheckpointReader(open_checkpoint(checkpoint)) as reader:
        return reader.rows("norm.weight", 0, 64)


def test_one_file_comes_before_an_index(make_checkpoint: Make) -> None:
    new, old = make_checkpoint(seed=1), make_checkpoint(seed=2, shards=2)
    wanted = as_one_file(new)[NORM].float().numpy()
    for file in old.glob("model.safetensors*"):
        shutil.copyfile(file, new / file.name)
    np.testing.assert_array_equal(norm(new), wanted)
    checkpoint = open_checkpoint(new)
    assert any("index.json is ignored" in note for note in checkpoint.notes)
    assert any("00001-of-00002" in note for note in checkpoint.notes)
    for shard in new.glob("model.safetensors-*"):  # the index names files that are gone
        shard.unlink()
    np.testing.assert_array_equal(norm(new), wanted)


def test_an_index_counts_that_names_the_one_file_too(make_checkpoint: Make) -> None:
    """As quantizers write it that copy the draft head to a file of its own."""
    path = make_checkpoint()
    tensors = as_one_file(path)
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")}
    save_file(tensors, path / "model.safetensors")
    save_file(head, path / "mtp.safetensors")
    weight_map = dict.fromkeys(tensors, "model.safetensors") | dict.fromkeys(head, "mtp.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(path)
    check_tensors(checkpoint)
    assert has_mtp(checkpoint) and not checkpoint.notes


def test_a_draft_head_in_a_file_that_no_index_lists(make_checkpoint: Make) -> None:
    path = make_checkpoint()
    tensors = as_one_file(path)
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")}
    save_file(tensors, path / "model.safetensors")
    assert "no tensor mtp.* is stored" in inspect_checkpoint(path, targets=("onnxruntime",))["targets"][0]["no_draft_head"]
    save_file(head, path / "model_extra_tensors.safetensors")
    checkpoint = open_checkpoint(path)
    check_tensors(checkpoint)
    assert has_mtp(checkpoint)
    assert any("model_extra_tensors.safetensors" in note for note in checkpoint.notes)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model.safetensors-00001-of-00002.safetensors"])
def test_git_lfs_pointers(checkpoint_copy: Path, name: str) -> None:
    (checkpoint_copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5000\n")
    with pytest.raises(CheckpointError, match=r"git-lfs pointer.*git lfs pull") as raised:
        open_checkpoint(checkpoint_copy)
    assert name in str(raised.value)


@pytest.mark.parametrize("with_config", [False, True])
def test_the_directory_of_an_adapter(tiny_checkpoint: Path, tmp_path: Path, with_config: bool) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3.5-0.8B", "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(
        {"base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)}, tmp_path / "adapter_model.safetensors"
    )
    if with_config:
        shutil.copyfile(tiny_checkpoint / "config.json", tmp_path / "config.json")
    fix = "Give its base model Qwen/Qwen3.5-0.8B as checkpoint, and this directory as lora"
    with pytest.raises(CheckpointError, match=rf"LORA adapter, not a model.*{fix}"):
        open_checkpoint(tmp_path)


def test_an_adapter_beside_a_model_is_not_ignored(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"adapter beside weights.*move adapter_config.json away"):
        open_checkpoint(checkpoint_copy)


def test_weights_with_an_adapter_that_is_not_merged(make_checkpoint: Make) -> None:
    path = make_checkpoint()
    tensors = as_one_file(path)
    tensors["model.language_model.layers.0.mlp.up_proj.base_layer.weight"] = tensors.pop("model.language_model.layers.0.mlp.up_proj.weight")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not merged.*base_layer"):
        open_checkpoint(path)


@pytest.mark.parametrize("head", ["v_head.summary.weight", "score.weight", "classifier.weight", "value_head.bias"])
def test_heads_beside_the_model_are_ignored_with_a_note(make_checkpoint: Make, head: str) -> None:
    path = make_checkpoint(tiny_config(vision=False))
    save_file(as_one_file(path) | {head: torch.zeros(1, 64)}, path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    check_tensors(checkpoint)
    assert any(head in note for note in checkpoint.notes)


def test_other_kinds_of_weight_files_are_named(checkpoint_copy: Path) -> None:
    for file in checkpoint_copy.glob("model.safetensors*"):
        file.unlink()
    (checkpoint_copy / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"no safetensors files.*pytorch_model.bin.*save_pretrained"):
        open_checkpoint(checkpoint_copy)
