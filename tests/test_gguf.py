"""GGUF files of the family as checkpoints. The files are written here from the demo checkpoints, as llama.cpp's converter folds them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType as Kind
from tokenizers import Tokenizer

from qwen_export.building.build_plan import plan_build
from qwen_export.building.text_assets import stop_ids
from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint, open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.llama_cpp.gguf_header import read_gguf
from qwen_export.plugins.native.native_library import find_library
from tests.support.gguf_files import DENSE, MOE, matrices, write_gguf, written

needs_plugin = pytest.mark.skipif(find_library("cpu") is None, reason="plugins/native/cpu/build.sh was not run")


def values(checkpoint: Checkpoint) -> dict[str, npt.NDArray[np.float32]]:
    """All weights, by the names of the modules, with the experts of a layer one by one."""
    found = {}
    with CheckpointReader(checkpoint) as reader:
        for released, weight in checkpoint.weights.items():
            name = released.removeprefix(checkpoint.config.text_prefix)
            rows = reader.rows(name, 0, weight.shape[0])
            if name.endswith("experts.gate_up_proj"):
                for e, (gate, up) in enumerate(rows.reshape(len(rows), 2, -1, rows.shape[-1])):
                    found[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                    found[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
            elif name.endswith("experts.down_proj"):
                found |= {name.replace("down_proj", f"{e}.down_proj.weight"): down for e, down in enumerate(rows)}
            else:
                found[name] = rows
    return found


def test_the_header_is_what_the_package_reads(dense_q8: Path) -> None:
    ours, theirs = read_gguf(dense_q8), gguf.GGUFReader(dense_q8)
    assert ours.metadata == {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        got = ours.tensors[tensor.name]
        assert (got.kind, got.shape) == (tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist())))
        assert (got.info.offset, got.info.nbytes) == (tensor.data_offset, tensor.n_bytes)


@pytest.mark.parametrize("source", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16], ids=lambda kind: kind.name)
def test_folds_are_undone(tmp_path: Path, source: Path, kind: Kind) -> None:
    """Matrices are the same to the bit; norms and decays to the rounding of fp32."""
    checkpoint = open_checkpoint(written(source, tmp_path / "model.gguf", kind))
    got, expected = values(checkpoint), values(open_checkpoint(source))
    assert got.keys() == expected.keys()
    for name, rows in expected.items():
        assert got[name].shape == rows.shape
        folded = "norm" in name or name.endswith("A_log")
        np.testing.assert_allclose(got[name], rows, atol=2.5e-7 if folded else 0, rtol=0, err_msg=name)
    matrix = checkpoint.weights["model.layers.0.linear_attn.in_proj_qkv.weight"]
    assert (matrix.dtype, matrix.quantized) == (kind.name, False)


@pytest.mark.parametrize("source", [DENSE, MOE], ids=["dense", "moe"])
def test_the_configuration_is_the_checkpoints(tmp_path: Path, source: Path) -> None:
    got = open_checkpoint(written(source, tmp_path / "model.gguf", Kind.F16)).config
    expected = open_checkpoint(source).config
    ids = {"eos_token_ids": None}
    assert got.text.to_json() | ids == expected.text.to_json() | ids
    assert got.architecture == expected.architecture and got.quantization is None


def test_tokenizer_template_and_stop_ids_come_from_the_metadata(dense_q8: Path) -> None:
    checkpoint = open_checkpoint(dense_q8)
    directory = checkpoint.text_directory
    got, expected = (json.loads((path / "tokenizer.json").read_text(encoding="utf-8")) for path in (directory, DENSE))
    assert got["added_tokens"] == expected["added_tokens"]
    assert got["model"] == expected["model"]
    theirs, ours = Tokenizer.from_file(str(DENSE / "tokenizer.json")), Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in (
        "Hello, world!\n\n  Don't  stop",
        "Ångström e\u0301 ﬁ 12345 日本語\t\t\r\n x",
        "<think>\n<|im_end|><|fim_prefix|>a<tool_call>",
    ):
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)
    assert (directory / "chat_template.jinja").read_bytes() == (DENSE / "chat_template.jinja").read_bytes()
    assert stop_ids(directory, checkpoint.config.text.eos_token_ids) == stop_ids(DENSE, (8128,)) == (8128, 8130)


def random_blocks(kind: Kind, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """Blocks of any type, with values that are finite."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    for _ in range(200):
        raw = rng.integers(0, 256, (rows, columns // block * nbytes), np.uint8)
        halves = raw.reshape(-1, nbytes)
        # Scales are fp16 numbers at one of the ends of a block. Exponents become small.
        for at in (1, 3, nbytes - 1, nbytes - 3):
            halves[:, at] &= 0x0F if kind != Kind.MXFP4 else 0xFF
        if kind == Kind.MXFP4:
            halves[:, 0] = rng.integers(110, 130, len(halves))
        if np.isfinite(gguf.quants.dequantize(raw, kind)).all():
            return raw
    raise AssertionError(kind)


BLOCKS = ["Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("name", BLOCKS)
def test_other_blocks_are_dequantized_as_the_package_does(tmp_path: Path, name: str) -> None:
    kind = Kind[name]

    def encode(value: npt.NDArray[Any], chosen: Kind) -> npt.NDArray[Any]:
        if chosen != kind:
            return gguf.quants.quantize(value, chosen)
        return random_blocks(kind, value.size // value.shape[-1], value.shape[-1]).reshape(*value.shape[:-1], -1)

    encoded = write_gguf(DENSE, tmp_path / "model.gguf", matrices(kind), encode=encode)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.weights["model.layers.0.mlp.up_proj.weight"].storage == name.lower()
    expected = gguf.quants.dequantize(encoded["blk.0.ffn_up.weight"], kind)
    with CheckpointReader(checkpoint) as reader:
        np.testing.assert_array_equal(reader.rows("layers.0.mlp.up_proj.weight", 3, 77), expected[3:77])
        out = gguf.quants.dequantize(encoded["blk.0.ssm_out.weight"], kind)
        heads = out.reshape(256, 2, 2, 64).swapaxes(1, 2).reshape(256, 256)
        np.testing.assert_array_equal(reader.rows("layers.0.linear_attn.out_proj.weight", 0, 256), heads)
    entry = inspect_checkpoint(tmp_path / "model.gguf", targets=["onnxruntime"])
    assert f"{name.lower()}" in entry["quantization"]
    assert any(target["supported"] for target in entry["targets"])


def test_parts_of_a_split_model(tmp_path: Path) -> None:
    written(DENSE, tmp_path / "demo.gguf", Kind.Q8_0, parts=3)
    files = sorted(tmp_path.glob("*.gguf"))
    assert [file.name for file in files] == [f"demo-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"GGUF")
    expected = {file.name for file in files}
    for path in (tmp_path, files[0], files[2]):
        checkpoint = open_checkpoint(path)
        assert {info.file.name for info in checkpoint.tensors.values()} == expected
    plan_build(open_checkpoint(tmp_path), precision="int8")


def test_a_file_without_its_extension(tmp_path: Path, dense_q8: Path) -> None:
    """As ollama stores models, under their hashes."""
    shutil.copyfile(dense_q8, tmp_path / "sha256-1234")
    assert open_checkpoint(tmp_path / "sha256-1234").config.text.hidden_size == 256


def test_without_a_draft_head(tmp_path: Path) -> None:
    """Converters leave it out, and then block_count has the layers of the decoder alone."""
    source = tmp_path / "source"
    shutil.copytree(DENSE, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 0}))
    file = tmp_path / "model.gguf"
    write_gguf(source, file, matrices(Kind.F16), skip=lambda name: name.startswith("blk.8."))
    checkpoint = open_checkpoint(file)
    assert plan_build(checkpoint).no_head == "the checkpoint has no draft head (mtp.*)"


def test_inspect_says_what_is_stored(dense_q8: Path) -> None:
    report = inspect_checkpoint(dense_q8, targets=["onnxruntime"])
    assert report["model"]["layers"] == 8 and report["architecture"] == "Qwen3_5ForCausalLM"
    assert re.match(r"gguf \(\d+ q8_0, \d+ fp32\)", report["quantization"])
    assert report["parts"]["mtp"]["parameters"] == inspect_checkpoint(DENSE, targets=["onnxruntime"])["parts"]["mtp"]["parameters"]
