"""GGUF files that are damaged, foreign, or would be another model: one message each, and no traceback."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from qwen_export.errors import CheckpointError, QwenExportError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.tensor_names import check_tensors
from tests.support.family import tiny_config
from tests.support.gguf_files import matrices, write_gguf
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = write_tiny_tokenizer(directory / "tokenizer")
    return synthesize(tiny_config(vision=False, layers=4), directory / "checkpoint", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    file = source.parent / "model.gguf"
    write_gguf(source, file, matrices(Kind.Q8_0))
    return file


def small(path: Path, architecture: str, add: Callable[[gguf.GGUFWriter], None]) -> Path:
    """A file with a few keys and one tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    add(writer)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FOREIGN = [
    ("llama", lambda writer: None, "not one of the Qwen3.5"),
    ("clip", lambda writer: None, r"vision tower \(mmproj\)"),
    ("qwen35", lambda writer: writer.add_type("adapter"), "LoRA adapter, not a model"),
    ("qwen35", lambda writer: None, "'block_count'.*got nothing"),
]


@pytest.mark.parametrize(("architecture", "add", "message"), FOREIGN, ids=["llama", "mmproj", "adapter", "empty"])
def test_foreign_files(tmp_path: Path, architecture: str, add: Callable[[gguf.GGUFWriter], None], message: str) -> None:
    with pytest.raises(QwenExportError, match=message):
        open_checkpoint(small(tmp_path / "model.gguf", architecture, add))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"expert_weights_scale": 2.5}, "expert_weights_scale"),
        ({"rope.scaling.type": "longrope"}, "'none' or 'yarn'"),
        ({"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 1.5}, "attn_factor"),
    ],
    ids=["unknown key", "scaled experts", "longrope", "another yarn"],
)
def test_keys_that_would_change_the_model(source: Path, tmp_path: Path, extra: dict[str, int | float | str | bool], message: str) -> None:
    write_gguf(source, tmp_path / "model.gguf", matrices(Kind.F16), extra=extra)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "model.gguf")


def test_yarn_is_read(source: Path, tmp_path: Path) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 4096}
    write_gguf(source, tmp_path / "model.gguf", matrices(Kind.F16), extra=yarn)
    rope = open_checkpoint(tmp_path / "model.gguf").config.text.rope
    assert (rope.kind, rope.factor, rope.original_max_position_embeddings) == ("yarn", 4.0, 4096)


def test_a_tensor_that_belongs_to_nothing(source: Path, tmp_path: Path) -> None:
    names = {"blk.0.ffn_up.weight": "blk.0.ffn_up.scale"}
    write_gguf(source, tmp_path / "model.gguf", matrices(Kind.F16), rename=names)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.scale"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_tensor_that_is_missing(source: Path, tmp_path: Path) -> None:
    write_gguf(source, tmp_path / "model.gguf", matrices(Kind.F16), skip=lambda name: name == "blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        check_tensors(open_checkpoint(tmp_path / "model.gguf"))


def test_a_decay_that_is_not_folded(source: Path, tmp_path: Path) -> None:
    """A file of another converter, which stores A_log as it is."""
    encoded = write_gguf(source, tmp_path / "model.gguf", lambda name, shape: Kind.F32, change={"blk.0.ssm_a": np.abs})
    assert (encoded["blk.0.ssm_a"] > 0).all()
    with CheckpointReader(open_checkpoint(tmp_path / "model.gguf")) as reader, pytest.raises(CheckpointError, match="decay"):
        reader.rows("layers.0.linear_attn.A_log", 0, 4)


def test_a_type_without_a_dequantizer(source: Path, tmp_path: Path) -> None:
    write_gguf(source, tmp_path / "model.gguf", lambda name, shape: Kind.F64 if "ffn_up" in name else Kind.F32, encode=as_doubles)
    with pytest.raises(UnsupportedError, match="F64"):
        open_checkpoint(tmp_path / "model.gguf")


def as_doubles(value: np.ndarray, kind: Kind) -> np.ndarray:
    return value.astype(np.float64) if kind == Kind.F64 else gguf.quants.quantize(value, kind)


def test_several_models_in_a_directory(whole: Path, tmp_path: Path) -> None:
    for name in ("a-Q4_0.gguf", "b-Q8_0.gguf"):
        shutil.copyfile(whole, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several GGUF models.*a-Q4_0\.gguf, b-Q8_0\.gguf"):
        open_checkpoint(tmp_path)


def test_a_part_that_is_missing(source: Path, tmp_path: Path) -> None:
    write_gguf(source, tmp_path / "demo.gguf", matrices(Kind.F16), parts=3)
    (tmp_path / "demo-00002-of-00003.gguf").unlink()
    for path in (tmp_path, tmp_path / "demo-00003-of-00003.gguf"):
        with pytest.raises(CheckpointError, match="without demo-00002-of-00003"):
            open_checkpoint(path)
    (tmp_path / "demo-00001-of-00003.gguf").rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="1 of 3 parts"):
        open_checkpoint(tmp_path / "renamed.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[: len(data) // 2], "cut off"),
        (lambda data: data[:10], "too short"),
        (lambda data: b"GGML" + data[4:], "not a GGUF file"),
        (lambda data: data[:4] + (1).to_bytes(4, "little") + data[8:], "version 1"),
        (lambda data: data[:4] + (3).to_bytes(4, "big") + data[8:], "other byte order"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "impossible counts"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 1\n", "git-lfs"),
    ],
    ids=["half", "stub", "magic", "version", "big-endian", "counts", "git-lfs"],
)
def test_damaged_files(whole: Path, tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    (tmp_path / "model.gguf").write_bytes(change(whole.read_bytes()))
    with pytest.raises(QwenExportError, match=message):
        open_checkpoint(tmp_path / "model.gguf")


def test_any_damage_of_the_header_is_a_message(whole: Path, tmp_path: Path) -> None:
    data, file, rng = bytearray(whole.read_bytes()), tmp_path / "model.gguf", random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(4, 6000)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        file.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(file)
            assert checkpoint.text_directory.is_dir()
            check_tensors(checkpoint)
        except QwenExportError as error:
            assert error.fix
