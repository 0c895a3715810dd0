"""Other prefixes of tensors than those of the releases: read where the mapping is certain, else both prefixes are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.tensor_names import check_tensors, decoder_tensors
from tests.support.family import tiny_config

Make = Callable[..., Path]
Rename = Callable[[str], str]

PREFIXES: dict[str, tuple[bool, Rename]] = {
    "flat configuration, model.language_model.*": (False, lambda n: n.replace("model.", "model.language_model.", 1)),
    "nested configuration, model.layers.*": (True, lambda n: n.replace("model.language_model.", "model.")),
    "language_model.model.* (transformers 4, MLX)": (
        True,
        lambda n: n.replace("model.language_model.", "language_model.model.").replace("lm_head", "language_model.lm_head"),
    ),
    "base_model.model.* (PEFT)": (False, lambda n: f"base_model.model.{n}"),
    "module.* (data parallel training)": (True, lambda n: f"module.{n}"),
    "_orig_mod.* (torch.compile)": (False, lambda n: f"_orig_mod.{n}"),
    "language_model three times": (True, lambda n: n.replace("language_model.", "language_model." * 3)),
    "no prefix (a base model)": (False, lambda n: n.removeprefix("model.")),
    "model.mtp.*": (True, lambda n: f"model.{n}" if n.startswith("mtp.") else n),
}


def renamed(path: Path, rename: Rename) -> None:
    """One file whose tensors have other names."""
    tensors = {}
    for shard in path.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, path / "model.safetensors")


@pytest.mark.parametrize("form", PREFIXES)
def test_prefixes_that_tools_write(make_checkpoint: Make, form: str) -> None:
    vision, rename = PREFIXES[form]
    config = tiny_config(vision=vision)
    path, plain = make_checkpoint(config), make_checkpoint(config)
    renamed(path, rename)
    found, wanted = open_checkpoint(path), open_checkpoint(plain)
    check_tensors(found)
    assert found.notes and found.tensors.keys() == wanted.tensors.keys()
    with CheckpointReader(found) as ours, CheckpointReader(wanted) as theirs:
        for name, shape in decoder_tensors(found.config.text):
            np.testing.assert_array_equal(ours.rows(name, 0, shape[0]), theirs.rows(name, 0, shape[0]))


def test_a_prefix_that_is_not_known_is_named_with_the_expected_one(make_checkpoint: Make) -> None:
    path = make_checkpoint(tiny_config(vision=False), with_mtp=False)
    renamed(path, lambda name: f"thinker.{name}")
    with pytest.raises(CheckpointError, match=r"got the prefix thinker\.model.*expected the prefix model\."):
        check_tensors(open_checkpoint(path))
    why = inspect_checkpoint(path, targets=("onnxruntime",))["targets"][0]["why"]
    assert "names of another model" in why and "thinker." in why


def test_two_sets_of_weights_are_refused(make_checkpoint: Make) -> None:
    path = make_checkpoint(tiny_config(vision=False))
    tensors = {}
    for shard in path.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    other = {f"module.{name}": tensor + 1 for name, tensor in tensors.items()}
    save_file(tensors | other, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="two sets of weights under different prefixes"):
        open_checkpoint(path)


def test_what_mlx_stores_in_another_layout_is_not_read(make_checkpoint: Make) -> None:
    """MLX adds the 1 of zero-centered norms to their weights, and turns the convolution: that is how its checkpoints are known."""
    path = make_checkpoint(tiny_config(vision=False))
    tensors = {}
    for shard in path.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    turned = {name: t.transpose(1, 2).contiguous() if name.endswith("conv1d.weight") else t for name, t in tensors.items()}
    save_file(turned, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"conv1d.*MLX"):
        check_tensors(open_checkpoint(path))
