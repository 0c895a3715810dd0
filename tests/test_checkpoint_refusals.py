"""What a build refuses before it reads a weight: tensors, files, the index, the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_export.building.build_plan import plan_build
from qwen_export.building.compiler import build
from qwen_export.errors import CheckpointError, ConfigError, QwenExportError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.weight_files import INDEX
from tests.support.family import tiny_config
from tests.support.safetensors_files import (
    add_tensor,
    edit_header,
    edit_json,
    join_file,
    remove_tensor,
    shards,
    split_file,
)

LAYER, TEXT = "model.language_model.layers.0.", "text_config"
Make = Callable[..., Path]

# What messages of Python itself look like.
_JARGON = ("Traceback", "Error(", "NoneType", "to unpack", "argument", "object has no", "unhashable", "indices must", "subscriptable")


def refused(directory: Path, kind: type[QwenExportError], *mentions: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A build of `directory` fails with one clear message, before a graph is captured, a weight read or anything written."""

    def reached(*arguments: object) -> None:
        raise AssertionError("the build began its work")

    monkeypatch.setattr("qwen_export.building.lower_graphs.lower", reached)
    for read in ("rows", "codes", "stored", "whole"):
        monkeypatch.setattr(CheckpointReader, read, reached)
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


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/dir.safetensors", "..", ".", "", "a\\b", "a\0b", "a\ud800b"])
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
