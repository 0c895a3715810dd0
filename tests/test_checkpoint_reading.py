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

from qwen_export.building.build_plan import plan_build
from qwen_export.building.compiler import build
from qwen_export.building.text_assets import check_text_assets, stop_ids
from qwen_export.errors import CheckpointError, ConfigError, QwenExportError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.safetensors_header import read_header
from qwen_export.graphs.checkpoint.tensor_names import check_tensors, decoder_tensors, stored_name
from qwen_export.graphs.checkpoint.weight_files import INDEX
from qwen_export.graphs.config import parse_config
from tests.support.family import FAMILY, tiny_config
from tests.support.safetensors_files import (
    add_tensor,
    edit_header,
    edit_json,
    join_file,
    overwrite_tensor,
    remove_tensor,
    split_file,
)

LAYER, TEXT = "model.language_model.layers.0.", "text_config"
Make = Callable[..., Path]

# What messages of Python itself look like.
_JARGON = ("Traceback", "Error(", "NoneType", "to unpack", "argument", "object has no", "unhashable", "indices must", "subscriptable")


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


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


def refused(directory: Path, kind: type[QwenExportError], *mentions: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A build of `directory` fails with one clear sentence, before a graph is captured, a weight read or anything written."""

    def reached(*arguments: object) -> None:
        raise AssertionError("the build began its work")

    monkeypatch.setattr("qwen_export.building.lower_graphs.lower", reached)
    monkeypatch.setattr(CheckpointReader, "_fill", reached)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(kind) as raised:
        build(directory, out / "bundle")
    assert list(out.iterdir()) == []
    message = str(raised.value)
    for text in mentions:
        assert text in message
    assert "\n" not in message and message[-1] in ".?"
    for jargon in _JARGON:
        assert jargon not in message


@pytest.fixture
def is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    def check(directory: Path, kind: type[QwenExportError], *mentions: str) -> None:
        refused(directory, kind, *mentions, monkeypatch=monkeypatch, tmp_path=tmp_path)

    return check


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


# What is refused: tensors


def test_missing_tensor(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    remove_tensor(checkpoint_copy, LAYER + "mlp.up_proj.weight")
    is_refused(checkpoint_copy, CheckpointError, "missing", LAYER + "mlp.up_proj.weight")


def test_unused_tensor(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    add_tensor(checkpoint_copy, LAYER + "mlp.up_proj.bias", "BF16", [96], bytes(192))
    is_refused(checkpoint_copy, CheckpointError, LAYER + "mlp.up_proj.bias")


def test_misshaped_tensor(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    name = LAYER + "mlp.up_proj.weight"
    for shard in shards(checkpoint_copy):
        edit_header(shard, lambda header: header.get(name, {"shape": []})["shape"].reverse())
    is_refused(checkpoint_copy, CheckpointError, name, "(64, 96)", "(96, 64)")


def test_tensor_of_a_type_that_is_no_weight(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    name = LAYER + "mlp.up_proj.weight"
    for shard in shards(checkpoint_copy):
        edit_header(shard, lambda header: header.get(name, {}).update(dtype="I16"))
    is_refused(checkpoint_copy, CheckpointError, name, "I16")


def test_tensor_stored_in_two_shards(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    name = "model.language_model.norm.weight"
    first = shards(checkpoint_copy)[0]
    assert name not in split_file(first)[0]
    add_tensor(checkpoint_copy, name, "BF16", [64], bytes(128))
    is_refused(checkpoint_copy, CheckpointError, "twice", name, first.name)


# What is refused: files


def test_no_directory_and_no_weights(tmp_path: Path, checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a directory"):
        open_checkpoint(checkpoint_copy / "config.json")
    for file in (*shards(checkpoint_copy), checkpoint_copy / INDEX):
        file.unlink()
    is_refused(checkpoint_copy, CheckpointError, "no safetensors files")


def test_missing_shard(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    lost = shards(checkpoint_copy)[1]
    lost.unlink()
    is_refused(checkpoint_copy, CheckpointError, "missing", lost.name)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_file(checkpoint_copy: Path, is_refused: Callable[..., None], keep: int) -> None:
    shard = shards(checkpoint_copy)[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    is_refused(checkpoint_copy, CheckpointError, shard.name)


def test_file_longer_than_its_tensors(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    shard = shards(checkpoint_copy)[0]
    shard.write_bytes(shard.read_bytes() + b"\0")
    is_refused(checkpoint_copy, CheckpointError, shard.name, "longer")


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 63) + 1, (1 << 64) - 1])
def test_header_length_that_lies(checkpoint_copy: Path, is_refused: Callable[..., None], length: int) -> None:
    shard = shards(checkpoint_copy)[0]
    join_file(shard, *split_file(shard), length=length)
    is_refused(checkpoint_copy, CheckpointError, shard.name)


def move(header: dict[str, Any], index: int, by: int) -> None:
    entry = [e for name, e in header.items() if name != "__metadata__"][index]
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


@pytest.mark.parametrize(("index", "by", "word"), [(3, -4, "overlap"), (-1, 4, "hole"), (0, 4, "overlap")])
def test_overlaps_and_holes(checkpoint_copy: Path, is_refused: Callable[..., None], index: int, by: int, word: str) -> None:
    shard = shards(checkpoint_copy)[0]
    edit_header(shard, lambda header: move(header, index, by))
    is_refused(checkpoint_copy, CheckpointError, shard.name, word)


def test_hole_before_the_first_tensor(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    shard = shards(checkpoint_copy)[0]
    header, data = split_file(shard)
    for index in range(len(header) - 1):
        move(header, index, 8)
    join_file(shard, header, bytes(8) + data)
    is_refused(checkpoint_copy, CheckpointError, shard.name, "hole before its first tensor")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [64], "data_offsets": [0]},
        {"dtype": "BF16", "shape": [64], "data_offsets": [128, 0]},
        {"dtype": "BF16", "shape": [64.0], "data_offsets": [0, 128]},
        {"dtype": "BF16", "shape": [-64], "data_offsets": [0, 128]},
        {"dtype": "BF16", "shape": [True], "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": 64, "data_offsets": [0, 128]},
        {"dtype": "BF16", "shape": "64", "data_offsets": "01"},
        {"dtype": ["BF16"], "shape": [64], "data_offsets": [0, 128]},
        {"dtype": "BF17", "shape": [64], "data_offsets": [0, 128]},
        {"shape": [64], "data_offsets": [0, 128]},
        {"dtype": "BF16"},
        [0, 128],
        None,
        128,
    ],
)
def test_header_entry_of_another_form(checkpoint_copy: Path, is_refused: Callable[..., None], entry: object) -> None:
    shard = shards(checkpoint_copy)[0]
    edit_header(shard, lambda header: header.update({"odd\nname": entry}))
    is_refused(checkpoint_copy, CheckpointError, shard.name, "odd name")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"7", b"\xff\xfe{}", b"{", b"{}{}", b'{"a":1,"a":1}', b"[" * 100_000, b'{"a":' + b"9" * 9999 + b"}"]
)
def test_header_that_is_no_json_object(checkpoint_copy: Path, is_refused: Callable[..., None], text: bytes) -> None:
    shard = shards(checkpoint_copy)[0]
    join_file(shard, text, split_file(shard)[1])
    is_refused(checkpoint_copy, CheckpointError, shard.name)


# What is refused: the index


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/dir.safetensors", "..", ".", "", "a\\b", "a\0b"])
def test_index_naming_a_file_outside(checkpoint_copy: Path, is_refused: Callable[..., None], name: str) -> None:
    edit_json(checkpoint_copy / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    is_refused(checkpoint_copy, CheckpointError, "outside the directory", INDEX)


def test_index_naming_a_directory(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    (checkpoint_copy / "folder").mkdir()
    edit_json(checkpoint_copy / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": "folder"}))
    is_refused(checkpoint_copy, CheckpointError, "folder")


def test_index_naming_the_wrong_shard(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    def swap(index: dict[str, Any]) -> None:
        names = sorted(set(index["weight_map"].values()))
        index["weight_map"]["lm_head.weight"] = next(name for name in names if name != index["weight_map"]["lm_head.weight"])

    edit_json(checkpoint_copy / INDEX, swap)
    is_refused(checkpoint_copy, CheckpointError, "lm_head.weight", INDEX)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["b"]}}', "[" * 100_000]
)
def test_index_of_another_form(checkpoint_copy: Path, is_refused: Callable[..., None], text: str) -> None:
    (checkpoint_copy / INDEX).write_text(text)
    is_refused(checkpoint_copy, CheckpointError, INDEX)


# What is refused: the configuration


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"a"', "[" * 100_000])
def test_config_that_is_no_json_object(checkpoint_copy: Path, is_refused: Callable[..., None], text: str) -> None:
    (checkpoint_copy / "config.json").write_text(text)
    is_refused(checkpoint_copy, ConfigError, "config.json")


def test_config_missing_or_not_text(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    (checkpoint_copy / "config.json").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_checkpoint(checkpoint_copy)
    (checkpoint_copy / "config.json").unlink()
    is_refused(checkpoint_copy, ConfigError, "no config.json")


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], [], None, "Qwen3_5ForCausalLM", [["Qwen3_5ForCausalLM"]], [7], {"a": 1}])
def test_other_architectures(checkpoint_copy: Path, is_refused: Callable[..., None], architectures: object) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config.update(architectures=architectures))
    is_refused(checkpoint_copy, UnsupportedError, "architecture", "Qwen3_5ForCausalLM")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("attn_output_gate", False),
        ("output_gate_type", "sigmoid"),
        ("mtp_use_dedicated_embeddings", True),
        ("mlp_only_layers", [1]),
        ("model_type", "qwen3"),
        ("tie_word_embeddings", "no"),
        ("vocab_size", 0),
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("intermediate_size", None),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 5),
        ("layer_types", ["full_attention"] * 3 + ["sliding_attention"]),
        ("layer_types", [["full_attention"]] * 4),
        ("layer_types", "full_attention"),
        ("num_attention_heads", 3),
        ("linear_num_value_heads", 3),
        ("linear_conv_kernel_dim", 1),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", 10**400),
        ("max_position_embeddings", -1),
        ("eos_token_id", "end"),
        ("eos_token_id", [1, None]),
        ("quantization_config", "fp8"),
        ("rope_parameters", "yarn"),
        ("rope_parameters", [1]),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_config_values_that_cannot_be_used(checkpoint_copy: Path, is_refused: Callable[..., None], key: str, value: object) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config[TEXT].update({key: value}))
    is_refused(checkpoint_copy, ConfigError, {"num_hidden_layers": "_"}.get(key, key), "config.json")


@pytest.mark.parametrize(
    ("rope", "mention"),
    [
        ({"rope_type": "longrope"}, "longrope"),
        ({"low_freq_factor": 1.0}, "low_freq_factor"),
        ({"beta_fast": 32}, "beta_fast"),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": "a", "mscale_all_dim": 1.0}, "mscale"),
        ({"mrope_section": [4, 4, 4]}, "mrope_section"),
        ({"mrope_section": 8}, "mrope_section"),
        ({"mrope_section": ["a", "b"]}, "mrope_section"),
        ({"mrope_interleaved": False}, "mrope_interleaved"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": "1e7"}, "rope_theta"),
        ({"partial_rotary_factor": 1.5, "mrope_section": None}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.05, "mrope_section": None}, "partial_rotary_factor"),
    ],
)
def test_rope_parameters_that_cannot_be_used(
    checkpoint_copy: Path, is_refused: Callable[..., None], rope: dict[str, object], mention: str
) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config[TEXT]["rope_parameters"].update(rope))
    is_refused(checkpoint_copy, ConfigError, mention, "config.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}'])
def test_generation_config_that_cannot_be_used(checkpoint_copy: Path, is_refused: Callable[..., None], text: str) -> None:
    (checkpoint_copy / "generation_config.json").write_text(text)
    is_refused(checkpoint_copy, CheckpointError, "generation_config.json")


# What is refused: other kinds of model


def test_quantization_methods_that_are_not_known(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"}))
    is_refused(checkpoint_copy, UnsupportedError, "bitsandbytes", "BF16")


def test_fp8_weights_without_a_quantization_config(checkpoint_copy: Path, is_refused: Callable[..., None]) -> None:
    name = LAYER + "mlp.up_proj.weight"
    remove_tensor(checkpoint_copy, name)
    add_tensor(checkpoint_copy, name, "F8_E4M3", [96, 64], bytes(96 * 64))
    is_refused(checkpoint_copy, CheckpointError, name, "F8_E4M3")


def test_all_reasons_come_at_once(make_checkpoint: Make) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tiny_config(moe=True)))
    with pytest.raises(UnsupportedError) as raised:
        plan_build(checkpoint, device="tpu", precision="fp64", max_context=10**9)
    for reason in ("'tpu'", "'fp64'", "1000000000"):
        assert reason in str(raised.value)


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
