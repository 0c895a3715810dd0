"""TopLogits of the plugins: the largest logits of each row, in the order that sampling counts on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from qwen_export import build
from qwen_export.plugins.native.native_library import LIBRARIES, find_library
from qwen_export.runtimes import load
from qwen_export.runtimes.sampling.sampler import Sampler, SamplingParams

Array = npt.NDArray[Any]
K = 64
SIZES = [1, 63, 64, 65, 300, 5000, 1 << 16, 248_320]


def library(device: str) -> Path:
    path = find_library(device)
    if path is None:
        pytest.skip(f"{LIBRARIES[device].file} is not built")
    return path


@cache
def session(device: str, threads: int, kind: int = TensorProto.FLOAT) -> ort.InferenceSession:
    """Logits of another kind than fp32 also come back in fp32."""
    wide = [] if kind == TensorProto.FLOAT else ["logits"]
    node = helper.make_node("WideTopLogits" if wide else "TopLogits", ["x"], ["values", "ids", *wide], domain="qwen.native", k=K)
    given = [helper.make_tensor_value_info("x", kind, [None, None])]
    made = [helper.make_tensor_value_info("values", TensorProto.FLOAT, None), helper.make_tensor_value_info("ids", TensorProto.INT32, None)]
    made += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wide]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qwen.native", 1)]
    model = helper.make_model(helper.make_graph([node], "top", given, made), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    options.register_custom_ops_library(str(library(device)))
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    return ort.InferenceSession(model.SerializeToString(), options, providers=[provider])


def check(device: str, x: Array, threads: int = 1) -> None:
    values, ids = session(device, threads).run(None, {"x": x})
    expect(x, values, ids)


def expect(x: Array, values: Array, ids: Array) -> None:
    rank = np.where(np.isnan(x), np.inf, x)
    for row in range(len(x)):
        order = np.lexsort((np.arange(x.shape[1]), -rank[row], ~np.isnan(x[row])))[:K]
        np.testing.assert_array_equal(ids[row], order)
        np.testing.assert_array_equal(values[row], x[row][order])


def rows(size: int, kind: str, count: int = 3) -> Array:
    rng = np.random.default_rng(size)
    x = rng.standard_normal((count, size)).astype(np.float32)
    if kind == "ties":
        return np.round(2 * x)
    if kind == "equal":
        return np.zeros_like(x)
    if kind == "ascending":
        return np.sort(x)
    if kind == "lost":
        x[:, :: max(1, size // 5)] = np.nan
        x[:, 1::7] = -np.inf
        x[:, 3::11] = np.inf
    return x


KINDS = pytest.mark.parametrize("kind", ["plain", "ties", "equal", "ascending", "lost"])


@KINDS
@pytest.mark.parametrize("size", SIZES)
def test_on_the_cpu(size: int, kind: str) -> None:
    check("cpu", rows(size, kind))


@pytest.mark.parametrize("threads", [1, 2])
def test_one_row_is_cut_in_two(threads: int) -> None:
    for kind in ("plain", "ties", "equal", "lost"):
        check("cpu", rows(248_320, kind, 1), threads)


def test_no_rows_are_no_work() -> None:
    values, ids = session("cpu", 1).run(None, {"x": np.zeros((0, 100), np.float32)})
    assert values.shape == ids.shape == (0, K)


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("size", SIZES)
def test_on_cuda(size: int, kind: str) -> None:
    check("cuda", rows(size, kind))


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind_of_logits", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_logits_of_16_bits_on_cuda(kind_of_logits: int, size: int, kind: str) -> None:
    x = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(halves(rows(size, kind), kind_of_logits), kind_of_logits)
    values, ids, wide = (found.numpy() for found in session("cuda", 1, kind_of_logits).run_with_ort_values(None, {"x": x}))
    expected = widened(halves(rows(size, kind), kind_of_logits), kind_of_logits)
    np.testing.assert_array_equal(wide, expected)
    expect(expected, values, ids)


def halves(x: Array, kind: int) -> Array:
    """Its 16 bits, cut off where they are bfloat16; fp16 as numpy's, the others as u16."""
    if kind == TensorProto.FLOAT16:
        return x.astype(np.float16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), (x.view(np.uint32) >> 16).astype(np.uint16)).astype(np.uint16)


def widened(x: Array, kind: int) -> Array:
    return x.astype(np.float32) if kind == TensorProto.FLOAT16 else (x.astype(np.uint32) << 16).view(np.float32)


def test_steps_of_a_bundle_have_them(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The sampler takes them, and chooses what it would choose from all logits."""
    library("cpu")
    decoder = load(build(tiny_checkpoint, tmp_path / "bundle", max_context=64), threads=1).decoder()
    decoder.prefill([1, 2, 3])
    for params in (SamplingParams(greedy=True), SamplingParams(top_k=20, seed=1)):
        row = decoder.step([4])[0]
        assert row.top is not None
        assert len(row.top.ids) == K
        few, every = (Sampler(params).distribution(logits) for logits in (row, row.array))
        assert few == every
