"""A whole quantized mixture layer on CUDA against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen_export.graphs.quantization.packing import QuantFormat
from tests.support.cuda_ops import LIMIT, Array, OneOp, error, normalized, rounded, silu
from tests.test_native_quantized import FORMATS, random_matrix

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
DISTINCT = 13
"""Experts: more are these again."""
ATTRIBUTES = ("bits", "block", "zeros", "wide_scales")


class Layer:
    """A layer of random weights, `formats` those of gate and up rows and of down rows, and rows of the stream for it."""

    def __init__(self, dtype: str, formats: tuple[QuantFormat, QuantFormat], E: int, K: int, H: int, inner: int, shared: int) -> None:
        rng = np.random.default_rng(E + H)
        self.dtype, self.K, self.inner, self.shared = dtype, K, inner, shared
        gate_up, down = formats
        made = [(random_matrix(gate_up, 2 * inner, H, seed), random_matrix(down, H, inner, seed)) for seed in range(min(E, DISTINCT))]
        experts = [made[e % DISTINCT] for e in range(E)]
        self.up, self.down = [up for (_, up), _ in experts], [down for _, (_, down) in experts]
        shared_up, self.shared_up = random_matrix(gate_up, 2 * shared, H, E)
        shared_down, self.shared_down = random_matrix(down, H, shared, E)
        self.norm = rounded(1 + rng.normal(size=H) / 4, dtype)
        self.router = rounded(2 * rng.normal(size=(E, H)) / np.sqrt(H), dtype)
        self.gate = rounded(rng.normal(size=(1, H)) / np.sqrt(H), dtype)
        self.weights = {name: (getattr(self, name), dtype) for name in ("norm", "router", "gate")}
        stacked = np.stack([up for (up, _), _ in experts]), np.stack([down for _, (down, _) in experts])
        matrices = {"shared_up": shared_up, "shared_down": shared_down, "up": stacked[0], "down": stacked[1]}
        self.weights |= {name: (matrix, "uint8") for name, matrix in matrices.items()}
        self.attributes: dict[str, Any] = {"norm_epsilon": 1e-6, "router_epsilon": 0.0, "experts_top_k": K, "experts_inner": inner}
        for name, format, N, width in (("gate_up", gate_up, 2 * shared, H), ("down", down, H, shared)):
            self.attributes |= {f"shared_{name}_{key}": value for key, value in format.attributes(N, width).items()}
            self.attributes |= {f"shared_{name}_epsilon": 0.0}
            self.attributes |= {f"experts_{name}_{key}": format.attributes(0, 0)[key] for key in ATTRIBUTES}
        # Rows whose choice does not hang on the rounding of a logit.
        rows = rounded(rng.normal(size=(1200, H)), dtype)
        logits = np.sort(normalized(rows, self.norm, dtype) @ self.router.T)
        self.rows = rows[logits[:, -K] - logits[:, -K - 1] > 8 * LIMIT[dtype]]

    def expected(self, s: Array) -> Array:
        h = normalized(s, self.norm, self.dtype)
        logits = rounded(h @ self.router.T, self.dtype)
        share = 1 / (1 + np.exp(-(h @ self.gate.T)))
        y = s + share * (self._inner(self.shared_up, h, self.shared) @ self.shared_down.T)
        for m, row in enumerate(h):
            chosen = np.argsort(-logits[m], kind="stable")[: self.K]
            weights = np.exp(logits[m, chosen] - logits[m].max())
            for e, weight in zip(chosen, weights / weights.sum(), strict=True):
                y[m] += weight * (self.down[e] @ self._inner(self.up[e], row, self.inner))
        return y

    def _inner(self, up: Array, h: Array, width: int) -> Array:
        both = h @ up.T
        return rounded(silu(both[..., :width]) * both[..., width:], self.dtype)

    def op(self, s: Array) -> OneOp:
        inputs = {"s": (s[np.newaxis], self.dtype)} | self.weights
        return OneOp("QuantMixture", self.dtype, inputs, {"y": ((1, *s.shape), self.dtype)}, **self.attributes)


@DTYPES
@pytest.mark.parametrize("formats", [(0, 0), (1, 1), (0, 2), (3, 3), (4, 4), (5, 6), (0, 4)], ids=str)
def test_a_layer(dtype: str, formats: tuple[int, int]) -> None:
    """Few rows and many; (0, 4) has no kernel of its own for few either. Widths that are no multiples of a unit of 128."""
    for E, K, H, inner, shared in ((16, 4, 64, 32, 48), (64, 8, 512, 128, 256), (304, 10, 264, 48, 16)):
        layer = Layer(dtype, (FORMATS[formats[0]], FORMATS[formats[1]]), E, K, H, inner, shared)
        for M in (1, 2, 5, 8, 9, 300) if E == 64 else (1, 7, 40):
            s = layer.rows[:M]
            assert len(s) == M
            expected = layer.expected(s)
            assert error(layer.op(s).run()["y"][0] - s, expected - s) < 3 * LIMIT[dtype], (E, M)


@DTYPES
def test_a_row_has_the_same_bits_in_any_company(dtype: str) -> None:
    layer = Layer(dtype, (FORMATS[0], FORMATS[0]), 32, 8, 512, 128, 128)
    whole = layer.op(layer.rows[:8]).run()["y"][0]
    for first, last in ((0, 1), (3, 4), (7, 8), (2, 5), (1, 7)):
        assert np.array_equal(layer.op(layer.rows[first:last]).run()["y"][0], whole[first:last])


@DTYPES
@pytest.mark.parametrize("M", [1, 3, 40])
def test_a_recorded_layer_reads_its_rows_again(dtype: str, M: int) -> None:
    layer = Layer(dtype, (FORMATS[0], FORMATS[0]), 256, 8, 2048, 64, 64)
    s = layer.rows[:M]
    expected, op = layer.expected(s), layer.op(s)
    results = [run["y"][0] for run in op.replays()]
    assert all(np.array_equal(result, results[0]) for result in results)
    assert error(results[0] - s, expected - s) < 3 * LIMIT[dtype]


def test_equal_logits() -> None:
    """All zeros: the experts of the lowest numbers."""
    layer = Layer("float16", (FORMATS[0], FORMATS[0]), 64, 8, 64, 32, 32)
    layer.router = np.zeros_like(layer.router)
    layer.weights["router"] = (layer.router, "float16")
    s = layer.rows[:2]
    assert error(layer.op(s).run()["y"][0], layer.expected(s)) < LIMIT["float16"]
