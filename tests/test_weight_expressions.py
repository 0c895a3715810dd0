"""Lazy weights: any split of rows gives the rows of the whole, the whole is what numpy and torch make of the stored tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_export.graphs.weights import expression
from qwen_export.graphs.weights.expression import (
    Array,
    Constant,
    HeadRows,
    Interleaved,
    NegativeExp,
    Offset,
    Reshaped,
    Stacked,
    StackedMatrices,
    StoredWeight,
    Transposed,
    Weight,
    add_weight,
)
from qwen_export.graphs.weights.weight_writer import ALIGNMENT, weight_bytes, write_weights

F32, F16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
TORCH = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


class Arrays:
    """A `TensorSource` of fp32 values that bf16 can hold, as a checkpoint does."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"a": (24, 6), "b": (7, 6), "norm": (13,), "a_log": (5,), "conv": (10, 1, 4), "c": (3, 4, 5)}
        self.tensors = {name: torch.randn(shape, generator=generator).bfloat16().float() for name, shape in shapes.items()}

    def rows(self, name: str, start: int, stop: int) -> Array:
        tensor = self.tensors[name]
        assert 0 <= start < stop <= len(tensor)
        return tensor[start:stop].numpy().copy()


SOURCE = Arrays()
A, B, NORM, A_LOG, CONV, C = (SOURCE.tensors[name] for name in ("a", "b", "norm", "a_log", "conv", "c"))


def stored(name: str, dtype: ir.DataType = F32) -> StoredWeight:
    return StoredWeight(name, tuple(SOURCE.tensors[name].shape), dtype)


def expected_and_weight(dtype: ir.DataType) -> dict[str, tuple[torch.Tensor, Weight]]:
    """Every expression and a few nested ones, with what torch makes of the same tensors in fp32."""
    a, b = stored("a", dtype), stored("b", dtype)
    heads = A.reshape(3, 8, 6)
    return {
        "stored": (A, a),
        "offset": (1 + NORM, Offset(stored("norm", dtype), 1.0)),
        "reshaped": (CONV.reshape(10, 4), Reshaped(stored("conv", dtype), (10, 4))),
        "transposed": (A.T, Transposed(a)),
        "head rows": (heads[:, 4:].reshape(12, 6), HeadRows(a, 8, 4, 4)),
        "uneven head rows": (heads[:, 1:4].reshape(9, 6), HeadRows(a, 8, 1, 3)),
        "stacked": (torch.cat([A, B, A]), Stacked((a, b, a))),
        "stacked heads": (torch.cat([heads[:, :4].reshape(12, 6), B]), Stacked((HeadRows(a, 8, 0, 4), b))),
        "transposed stack": (torch.cat([A, B]).T, Transposed(Stacked((a, b)))),
        "stacked matrices": (torch.stack([A[:12], A[12:]]), StackedMatrices((HeadRows(a, 24, 0, 12), HeadRows(a, 24, 12, 12)))),
        "interleaved": (C.reshape(3, 2, 2, 5).transpose(1, 2).reshape(3, 4, 5), Interleaved(stored("c", dtype))),
        "constant": (torch.tensor([1.5, -2.0, 0.25]), Constant((1.5, -2.0, 0.25), dtype)),
    }


CASES = [(name, dtype) for name in expected_and_weight(F32) for dtype in (F32, F16, BF16)]


def bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def torch_bits(tensor: torch.Tensor, dtype: ir.DataType) -> Array:
    """fp32 values rounded once to `dtype`, by torch."""
    rounded = tensor.contiguous().to(TORCH[dtype])
    return rounded.view(torch.int32 if dtype == F32 else torch.int16).numpy().view(np.uint32 if dtype == F32 else np.uint16)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_whole_is_what_torch_makes_of_it(name: str, dtype: ir.DataType) -> None:
    expected, weight = expected_and_weight(dtype)[name]
    got = weight.evaluate(SOURCE)
    assert weight.shape == tuple(expected.shape) == got.shape
    assert weight.dtype == dtype and got.dtype == dtype.numpy()
    assert weight.nbytes == got.nbytes
    np.testing.assert_array_equal(bits(got), torch_bits(expected, dtype))


def test_decay_scale_is_fp32_whatever_is_built() -> None:
    for dtype in (F32, F16, BF16):
        weight = NegativeExp(stored("a_log", dtype))
        got = weight.evaluate(SOURCE)
        assert weight.dtype == F32 and got.dtype == np.float32
        np.testing.assert_allclose(got, -np.exp(A_LOG.numpy().astype(np.float64)), rtol=3e-7)


def test_a_fold_is_rounded_once() -> None:
    """1 + w in bf16 twice rounded loses what a checkpoint of bf16 norms still has."""

    class Norm(Arrays):
        def rows(self, name: str, start: int, stop: int) -> Array:
            return np.array([0.00390625 * 1.5, 2.0**-9, -0.00195], np.float32)[start:stop]

    weight = Offset(StoredWeight("norm", (3,), BF16), 1.0)
    values = torch.from_numpy(Norm().rows("norm", 0, 3))
    np.testing.assert_array_equal(bits(weight.evaluate(Norm())), torch_bits(1 + values, BF16))


@pytest.mark.parametrize(("name", "dtype"), [case for case in CASES if case[1] != F16])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_rows_are_those_of_the_whole(name: str, dtype: ir.DataType, data: st.DataObject) -> None:
    _, weight = expected_and_weight(dtype)[name]
    start = data.draw(st.integers(0, weight.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, weight.shape[0]))
    np.testing.assert_array_equal(bits(weight.rows(SOURCE, start, stop)), bits(weight.evaluate(SOURCE))[start:stop])


@pytest.mark.parametrize("name", expected_and_weight(F32))
@pytest.mark.parametrize("limit", [1, 50, 4 * 6 * 5, 1 << 20])
def test_blocks_put_together_are_the_whole(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight = expected_and_weight(F32)[name]
    whole = weight.evaluate(SOURCE)
    monkeypatch.setattr(expression, "BLOCK_BYTES", limit)
    blocks = list(weight.blocks(SOURCE))
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    if not isinstance(weight, Transposed):
        row = whole.nbytes // len(whole)
        assert all(block.nbytes <= max(limit, row) for block in blocks)


def test_an_expression_names_what_it_reads() -> None:
    assert list(Stacked((HeadRows(stored("a"), 8, 0, 4), Transposed(stored("b")), Constant((0.0,) * 6, F32))[:1]).stored()) == ["a"]
    assert list(Stacked((stored("a"), stored("b"))).stored()) == ["a", "b"]
    assert list(Constant((1.0,), F32).stored()) == []


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="stack"):
        StackedMatrices((stored("a"), stored("b")))
    with pytest.raises(ValueError, match="interleave"):
        Interleaved(stored("a"))
    with pytest.raises(ValueError, match="stack"):
        Stacked((stored("a"), stored("norm")))
    with pytest.raises(ValueError, match="stack"):
        Stacked((stored("a"), stored("b", BF16)))
    with pytest.raises(ValueError, match="view"):
        Reshaped(stored("a"), (12, 12))


def written(path: Path) -> tuple[ir.Model, dict[str, Weight], str]:
    """All expressions in one file; returns the model, the weights by name and the recorded hash."""
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
    weights = {name: weight for name, (_, weight) in expected_and_weight(BF16).items()}
    for name, weight in weights.items():
        add_weight(model.graph, name, weight)
    size = weight_bytes([model])
    assert size == sum(weight.nbytes for weight in weights.values())
    seen: list[int] = []
    entry = write_weights([model], SOURCE, path, lambda name, count: seen.append(count))
    assert sum(seen) == size and entry.size == path.stat().st_size
    return model, weights, entry.sha256


def test_the_file_holds_every_weight_aligned_and_its_hash_is_right(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    model, weights, sha256 = written(path)
    raw = path.read_bytes()
    assert hashlib.sha256(raw).hexdigest() == sha256
    for name, weight in weights.items():
        tensor = model.graph.initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None and tensor.offset % ALIGNMENT == 0
        assert raw[tensor.offset : tensor.offset + weight.nbytes] == weight.evaluate(SOURCE).tobytes()


def test_writing_twice_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written(tmp_path / "first")[2]
    monkeypatch.setattr(expression, "BLOCK_BYTES", 40)
    assert written(tmp_path / "second")[2] == first
