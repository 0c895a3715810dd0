"""Linear and SwiGlu of the CPU plugin with the option of bf16 tiles, against float64 over rounded activations. The option is read once per
process, so this is a script:

QWEN_EXPORT_CPU_BF16_TILES=1 QWEN_EXPORT_CPU_SET=base_tiles python -m tests.support.bf16_tiles LIBRARY
"""

from __future__ import annotations

import sys
from itertools import product

import numpy as np
from ml_dtypes import bfloat16

from tests.support import cpu_plugin_ops as ops
from tests.support.cpu_plugin_ops import Array

FEWEST = 32
"""Rows that go to tiles; fewer are multiplied in fp32."""
ROWS = (32, 33, 48, 143)
# Part of a tile of K, one, and more than are read together; columns that fill a tile or not.
SHAPES = ((1, 1), (5, 16), (16, 32), (130, 333), (67, 1024), (48, 3584))
# Sums of 3584 products in fp32; a normalized value that lies between two of bf16 may go to either.
PLAIN, NORMED = 2e-6, 1e-3


def rounded(x: Array) -> Array:
    return np.asarray(x.astype(np.float32).astype(bfloat16).astype(np.float64))


def expected(op: str, x: Array, w: Array, residual: Array | None = None, norm: Array | None = None) -> Array:
    wide = x.astype(np.float64)
    if norm is not None:
        wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + ops.EPSILON) * norm
    return ops.expected(op, rounded(wide), w, residual)


def check(library: str) -> None:
    """Every form and shape; a row has the same bits among any others; few rows, and weights in fp32, stay exact."""
    for (op, extras), (N, K) in product(ops.FORMS, SHAPES):
        x, w, optional = ops.inputs(op, N, K, "bfloat16")
        x, given = x[: ROWS[-1]], {name: optional[name][: ROWS[-1]] if name == "residual" else optional[name] for name in extras}
        whole, where = ops.call(library, op, x, w, **given), (op, extras, N, K)
        assert ops.error(whole, expected(op, x, w, **given)) < (NORMED if "norm" in extras else PLAIN), where
        for M in ROWS[:-1]:
            part = {name: value[:M] if name == "residual" else value for name, value in given.items()}
            assert np.array_equal(ops.call(library, op, x[:M], w, **part), whole[:M]), ("bits differ", *where, M)
        few = {name: value[: FEWEST - 1] if name == "residual" else value for name, value in given.items()}
        exact = ops.call(library, op, x[: FEWEST - 1], w, **few)
        assert ops.error(exact, ops.expected(op, x[: FEWEST - 1], w, **few)) < ops.TOLERANCE, where
        wide = ops.call(library, op, x, w.astype(np.float32), **given)
        assert ops.error(wide, ops.expected(op, x, w, **given)) < ops.TOLERANCE, where


if __name__ == "__main__":
    check(sys.argv[1])
