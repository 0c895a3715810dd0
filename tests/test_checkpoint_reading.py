"""Reading checkpoints: every released layout is read exactly, every damaged one is refused with one clear error before any work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from qwen_export.building.text_assets import check_text_assets, stop_ids
from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.safetensors_header import read_header
from qwen_export.graphs.checkpoint.tensor_names import check_tensors, decoder_tensors, stored_name
from qwen_export.graphs.checkpoint.weight_files import INDEX
from qwen_export.graphs.config import parse_config
from tests.support.family import FAMILY, tiny_config
from tests.support.safetensors_files import edit_json, overwrite_tensor, shards

LAYER, TEXT = "model.language_model.layers.0.", "text_config"
Make = Callable[..., Path]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """What the safetensors library reads."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards(directory):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    return tensors


def assert_reads_exactly(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    check_tensors(checkpoint)
    expected = stored(directory)
    assert set(checkpoint.tensors) == set(expected)
    with CheckpointReader(checkpoint) as reader:
        for name, shape in decoder_tensors(checkpoint.config.text):
            whole = reader.rows(name, 0, shape[0])
            assert whole.dtype == np.float32
            np.testing.assert_array_equal(whole, expected[stored_name(checkpoint.config, name)].float().numpy(), err_msg=name)


# What is read


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_both_architectures_and_heads_are_read(make_checkpoint: Make, vision: bool, tied: bool) -> None:
    assert_reads_exactly(make_checkpoint(tiny_config(vision=vision, tied=tied)))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("fp32_decay", [True, False])
def test_stored_types_are_read_exactly(make_checkpoint: Make, dtype: str, fp32_decay: bool) -> None:
    assert_reads_exactly(make_checkpoint(dtype=dtype, fp32_decay=fp32_decay))


def test_rows_are_read_from_anywhere(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    expected = stored(tiny_checkpoint)["lm_head.weight"].float().numpy()
    with CheckpointReader(checkpoint) as reader:
        for start, stop in ((0, 1), (17, 60), (511, 512)):
            np.testing.assert_array_equal(reader.rows("lm_head.weight", start, stop), expected[start:stop])


def test_extreme_finite_values_are_read(checkpoint_copy: Path) -> None:
    name = LAYER + "input_layernorm.weight"
    values = torch.tensor([3.3e38, -3.3e38, 1e-40, -0.0, 2.0**-133], dtype=torch.bfloat16)
    overwrite_tensor(checkpoint_copy, name, values.view(torch.int16).numpy().tobytes())
    with CheckpointReader(open_checkpoint(checkpoint_copy)) as reader:
        got = reader.rows("layers.0.input_layernorm.weight", 0, 5)
    np.testing.assert_array_equal(got.view(np.uint32), values.float().numpy().view(np.uint32))


def test_shards_may_have_any_name(checkpoint_copy: Path) -> None:
    renamed = {shard.name: f"part {chr(97 + i)}.weights" for i, shard in enumerate(shards(checkpoint_copy))}
    for old, new in renamed.items():
        (checkpoint_copy / old).rename(checkpoint_copy / new)
    edit_json(checkpoint_copy / INDEX, lambda index: index.update(weight_map={k: renamed[v] for k, v in index["weight_map"].items()}))
    checkpoint = open_checkpoint(checkpoint_copy)
    check_tensors(checkpoint)
    assert {tensor.file.name for tensor in checkpoint.tensors.values()} == set(renamed.values())


def test_an_index_is_not_needed(checkpoint_copy: Path) -> None:
    (checkpoint_copy / INDEX).unlink()
    assert_reads_exactly(checkpoint_copy)


def test_files_that_the_index_does_not_name_are_ignored(checkpoint_copy: Path) -> None:
    shutil.copyfile(shards(checkpoint_copy)[0], checkpoint_copy / "consolidated.safetensors")
    check_tensors(open_checkpoint(checkpoint_copy))


def test_total_size_may_be_a_float(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / INDEX, lambda index: index["metadata"].update(total_size=1.5e6))
    check_tensors(open_checkpoint(checkpoint_copy))


def test_shards_may_be_links_out_of_the_directory(checkpoint_copy: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, shard in enumerate(shards(checkpoint_copy)):
        shard.rename(blobs / f"blob{i}")
        shard.symlink_to(blobs / f"blob{i}")
    assert_reads_exactly(checkpoint_copy)


def test_a_tied_head_may_be_stored_too(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config[TEXT].update(tie_word_embeddings=True))
    check_tensors(open_checkpoint(checkpoint_copy))


def test_generation_config_may_be_missing(tiny_checkpoint: Path, make_checkpoint: Make) -> None:
    bare = make_checkpoint(generation_config=False)
    check_text_assets(bare)
    assert stop_ids(bare, (480,)) == (480,)
    assert stop_ids(tiny_checkpoint, (480,)) == (480, 482)


@pytest.mark.parametrize("size", ["0.8B", "2B", "4B", "9B", "27B", "3.6-27B"])
def test_released_configurations_are_understood(size: str) -> None:
    config = parse_config(FAMILY[size])
    assert config.text.num_layers in (24, 32, 64) and config.text_prefix == "model.language_model."


# What is caught while weights stream by


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(make_checkpoint: Make, tmp_path: Path, dtype: str, value: float) -> None:
    directory = make_checkpoint(dtype=dtype)
    name = LAYER + "mlp.up_proj.weight"
    bad = torch.tensor([value], dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype])
    overwrite_tensor(directory, name, bad.view(torch.uint8).numpy().tobytes(), at=8)
    with CheckpointReader(open_checkpoint(directory)) as reader, pytest.raises(CheckpointError, match=rf"not finite.*{name}"):
        reader.rows("layers.0.mlp.up_proj.weight", 0, 96)


def test_projection_rows_of_zeros_are_read(checkpoint_copy: Path) -> None:
    name = LAYER + "mlp.up_proj.weight"
    overwrite_tensor(checkpoint_copy, name, bytes(2 * 64), at=5 * 2 * 64)
    with CheckpointReader(open_checkpoint(checkpoint_copy)) as reader:
        rows = reader.rows("layers.0.mlp.up_proj.weight", 3, 9)
    assert not rows[2].any() and rows[[0, 1, 3, 4, 5]].any(axis=1).all()


@pytest.mark.parametrize("name", ["model.language_model.embed_tokens.weight", "lm_head.weight"])
def test_padding_rows_of_the_vocabulary_may_be_zero(checkpoint_copy: Path, name: str) -> None:
    overwrite_tensor(checkpoint_copy, name, bytes(2 * 64 * 3), at=509 * 2 * 64)
    with CheckpointReader(open_checkpoint(checkpoint_copy)) as reader:
        assert not reader.rows(name.removeprefix("model.language_model."), 509, 512).any()


def test_file_that_is_cut_or_lost_after_its_header_was_read(checkpoint_copy: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_copy)
    head = checkpoint.tensors["lm_head.weight"]
    shard = head.file
    os.truncate(shard, head.offset + head.nbytes // 2)
    with CheckpointReader(checkpoint) as reader:
        reader.rows("lm_head.weight", 0, 256)
        with pytest.raises(CheckpointError, match=r"ends inside a tensor.*lm_head"):
            reader.rows("lm_head.weight", 255, 257)
    shard.unlink()
    with CheckpointReader(checkpoint) as reader, pytest.raises(CheckpointError, match=r"cannot be read.*lm_head"):
        reader.rows("lm_head.weight", 0, 1)


# Any damage at all


def small_header() -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, dtype, shape, offsets in (("a", "F32", [2, 3], [0, 24]), ("b.weight", "BF16", [5], [24, 34]), ("c", "F16", [0, 7], [34, 34])):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


HEADER = small_header()
DATA = bytes(range(34))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    raw = bytearray(HEADER + DATA)
    for _ in range(draw(st.integers(0, 3))):
        raw[draw(st.integers(0, len(HEADER) - 1))] = draw(st.integers(0, 255) | st.sampled_from(b'0123456789[]{},:"-'))
    return bytes(raw[: draw(st.just(len(raw)) | st.integers(0, len(raw)))])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged())
def test_any_damage_of_a_header_is_an_error_or_read_as_the_library_reads_it(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(raw)
    try:
        ours = read_header(path)
    except CheckpointError as error:
        assert path.name in str(error)
        return
    try:
        with safe_open(path, "np") as file:
            theirs = {name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        pytest.fail(f"read what the library refuses: {raw!r}")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in ours.items()} == theirs
    assert all(tensor.offset >= 0 and tensor.offset + tensor.nbytes <= len(raw) for tensor in ours.values())
