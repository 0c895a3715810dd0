"""Linear and SwiGlu of the CPU plugin against float64. A process has one instruction set, so this is also a script:

QWEN_EXPORT_CPU_SET=base python -m tests.support.cpu_plugin_ops LIBRARY
"""

from __future__ import annotations

import sys
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from ml_dtypes import bfloat16
from onnx import TensorProto, helper

from tests.support.plugin_session import plugin_session

Array = npt.NDArray[Any]

EPSILON = 1e-6
ROWS = (*range(1, 10), 12, 16, 17, 33, 64, 512)
# Odd sizes, less than a vector, a little over one, and widths that are no multiple of any vector.
SHAPES = ((1, 1), (3, 7), (5, 16), (4, 17), (130, 333), (67, 1024), (20, 3584))
# Sums of 3584 products in fp32.
TOLERANCE = 5e-6
_ELEMENT = {"float": TensorProto.FLOAT, "bfloat16": TensorProto.BFLOAT16}


@cache
def session(library: str, op: str, weight: str, extras: tuple[str, ...], threads: int = 2) -> ort.InferenceSession:
    """One node with inputs x, w and `extras`."""
    order = ("residual", "norm") if op == "Linear" else ("norm",)
    names = ["x", "w", *(name if name in extras else "" for name in order)]
    node = helper.make_node(op, names, ["y"], domain="qwen.native", epsilon=EPSILON)
    given = [helper.make_tensor_value_info(name, _ELEMENT[weight] if name == "w" else TensorProto.FLOAT, None) for name in names if name]
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])]
    return plugin_session(library, node, given, made, threads)


def call(library: str, op: str, x: Array, w: Array, threads: int = 2, **extras: Array | None) -> Array:
    """`w` is float32 or ml_dtypes.bfloat16."""
    weight = "bfloat16" if w.dtype == bfloat16 else "float"
    tensors = {"x": x, **{name: value for name, value in extras.items() if value is not None}}
    made = session(library, op, weight, tuple(sorted(tensors.keys() - {"x"})), threads)
    values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
    raw = np.ascontiguousarray(w).view(np.uint16 if weight == "bfloat16" else w.dtype)
    values["w"] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, _ELEMENT[weight])
    return np.asarray(made.run_with_ort_values(["y"], values)[0].numpy())


def silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def expected(op: str, x: Array, w: Array, residual: Array | None = None, norm: Array | None = None) -> Array:
    """The same in float64."""
    wide, weight = x.astype(np.float64), w.astype(np.float64)
    if norm is not None:
        wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPSILON) * norm
    h = wide @ weight.T
    if op == "SwiGlu":
        gate, up = np.split(h, 2, axis=-1)
        return np.asarray(silu(gate) * up)
    return np.asarray(h if residual is None else h + residual)


def error(got: Array, wanted: Array) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def inputs(op: str, N: int, K: int, weight: str) -> tuple[Array, Array, dict[str, Array]]:
    """x with the largest number of rows, w, and the optional inputs."""
    rng, M = np.random.default_rng(N * 10000 + K), ROWS[-1]
    w = rng.normal(size=((2 if op == "SwiGlu" else 1) * N, K)).astype(np.float32) / np.float32(np.sqrt(K))
    x, residual = rng.normal(size=(M, K)).astype(np.float32), rng.normal(size=(M, N)).astype(np.float32)
    norm = (1 + rng.normal(size=K) / 4).astype(np.float32)
    return x, w.astype(bfloat16) if weight == "bfloat16" else w, {"residual": residual, "norm": norm}


FORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Linear", ()),
    ("Linear", ("residual",)),
    ("Linear", ("norm",)),
    ("Linear", ("residual", "norm")),
    ("SwiGlu", ()),
    ("SwiGlu", ("norm",)),
)


def check(library: str) -> None:
    """Every op, combination of optional inputs, weight type, shape and number of rows; and a row has the same bits among any others."""
    for (op, extras), weight, (N, K) in product(FORMS, _ELEMENT, SHAPES):
        x, w, optional = inputs(op, N, K, weight)
        given = {name: optional[name] for name in extras}
        wanted, most = expected(op, x, w, **given), call(library, op, x, w, **given)
        where = (op, extras, weight, N, K)
        assert error(most, wanted) < TOLERANCE, where
        for M in ROWS[:-1]:
            got = call(library, op, x[:M], w, **{name: value[:M] if name == "residual" else value for name, value in given.items()})
            assert np.array_equal(got, most[:M]), ("bits differ", *where, M)


def check_prompt(library: str) -> None:
    """Rows enough for tiles of bf16, which are not wanted."""
    x, w, optional = inputs("Linear", 67, 1024, "bfloat16")
    assert error(call(library, "Linear", x, w, **optional), expected("Linear", x, w, **optional)) < TOLERANCE


if __name__ == "__main__":
    check(sys.argv[1])
