"""Bundles of GGUF files, and what they compute. The files are written here from the demo checkpoints, folded as llama.cpp does it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from qwen_export.building.build_plan import default_precision
from qwen_export.building.compiler import build
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.graphs.quantization.packing import QuantFormat, unpack
from qwen_export.manifest import load_manifest
from qwen_export.plugins.native.native_library import find_library
from qwen_export.runtimes import load
from qwen_export.verification.logit_check import verify
from tests.support.family import tiny_config
from tests.support.gguf_files import DENSE, MOE, matrices, write_gguf, written
from tests.support.packed_matrices import stored_bytes
from tests.support.synthesize import synthesize

needs_plugin = pytest.mark.skipif(find_library("cpu") is None, reason="plugins/native/cpu/build.sh was not run")


@needs_plugin
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
def test_codes_and_scales_are_in_the_bundle_bit_for_bit(tmp_path: Path, kind: Kind) -> None:
    source, bits = DENSE, 8 if kind == Kind.Q8_0 else 4
    encoded = write_gguf(source, tmp_path / "model.gguf", matrices(kind))
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    precision = f"int{bits}"
    assert default_precision(checkpoint, "onnxruntime", "cpu") == precision
    bundle = build(tmp_path / "model.gguf", tmp_path / "bundle", precision=precision, max_context=64, mtp=False)
    packed = stored_bytes(bundle)

    def blocks(name: str) -> tuple[Any, Any]:
        raw = encoded[name].reshape(len(encoded[name]), -1, 34 if bits == 8 else 18)
        codes = raw[:, :, 2:] ^ 128 if bits == 8 else np.concatenate([raw[:, :, 2:] & 15, raw[:, :, 2:] >> 4], axis=2)
        return codes, np.ascontiguousarray(raw[:, :, :2]).view(np.float16)[:, :, 0]

    def stored(prefix: str, rows: int, columns: int) -> tuple[Any, Any]:
        (raw,) = [raw for name, raw in packed.items() if name.startswith(prefix)]
        codes, scales, zeros = unpack(QuantFormat(bits, 32), raw, rows, columns)
        assert zeros is None
        return codes.reshape(rows, -1, 32), scales

    for got, expected in zip(stored("layers.1.mlp.down_proj", 256, 384), blocks("blk.1.ffn_down.weight"), strict=True):
        np.testing.assert_array_equal(got, expected)
    # Value heads of 64 values: 2 blocks. Head v of key head k is in the file as head 2 v + k, in the modules as 2 k + v.
    columns = np.arange(8).reshape(2, 2, 2).swapaxes(0, 1).reshape(-1)
    for got, expected in zip(stored("layers.0.linear_attn.out_proj", 256, 256), blocks("blk.0.ssm_out.weight"), strict=True):
        np.testing.assert_array_equal(got, expected[:, columns])
    entries = load_manifest(bundle).precision_plan
    assert entries["mlp stored quantized"] == f"24 kept: {kind.name.lower()}"
    assert entries["deltanet stored quantized"] == f"18 kept: {kind.name.lower()}"


def test_a_build_is_verified_and_answers(tmp_path: Path, dense_q8: Path) -> None:
    """With the draft head, from the file alone."""
    lonely = tmp_path / "moved" / "model.gguf"
    lonely.parent.mkdir()
    shutil.copyfile(dense_q8, lonely)
    bundle = build(lonely, tmp_path / "bundle", max_context=128)
    result = verify(bundle, lonely)
    assert result["passed"], result
    assert "transformers" in result["skipped"]
    assert load_manifest(bundle).speculation is not None
    answer = load(bundle).stream([{"role": "user", "content": "Hello"}], max_new_tokens=8)
    assert isinstance("".join(answer), str) and answer.tokens


def test_a_mixture_computes_what_its_checkpoint_does(tmp_path: Path) -> None:
    file = written(MOE, tmp_path / "moe.gguf", Kind.F16)
    ids = np.random.default_rng(0).integers(0, 8000, 24).tolist()
    got, expected = (EagerSequence(load_decoder(open_checkpoint(path)), 32).read(ids) for path in (file, MOE))
    np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize("grouped", [True, False])
def test_qwen3_next_with_its_own_layout(tmp_path: Path, grouped: bool) -> None:
    """in_proj_ba is grouped by key head in the file, and q k v z are not; value heads stay in their order."""
    config = tiny_config(generation="next", moe=True)
    source = synthesize(config, tmp_path / "source", grouped_inputs=True, fused_experts=False)
    file = tmp_path / "next.gguf"
    write_gguf(source, file, matrices(Kind.F32), architecture="qwen3next", grouped=grouped)
    ids = np.random.default_rng(0).integers(0, 400, 24).tolist()
    got, expected = (EagerSequence(load_decoder(open_checkpoint(path)), 32).read(ids) for path in (file, source))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_weights_that_stay_in_the_file(tmp_path: Path) -> None:
    file = written(DENSE, tmp_path / "model.gguf", Kind.BF16)
    bundle = build(file, tmp_path / "bundle", weights="reference", max_context=128, mtp=False)
    manifest = load_manifest(bundle)
    assert [reference.path for reference in manifest.references.values()] == [str(file.resolve())]
    assert verify(bundle, file)["passed"]
