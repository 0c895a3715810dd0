"""The kernels of the vision tower on CUDA against the eager op in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_export.graphs.ops.picture_attention_op import picture_attention
from tests.support.cuda_ops import LIMIT, OneOp, error, rounded

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@DTYPES
@pytest.mark.parametrize("D", [8, 64, 72, 80, 128])
@pytest.mark.parametrize(("B", "L"), [(1, 4), (2, 64), (1, 100), (3, 260), (1, 1000), (1, 2500)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_attention(dtype: str, D: int, B: int, L: int, with_bias: bool) -> None:
    """Blocks of all sizes, ends inside of a tile, and several slices; 16 heads of 2500 patches fill all processors."""
    heads = 16 if L > 2000 else 3
    chance = np.random.default_rng(D + L)
    qkv = rounded(chance.standard_normal((B, L, 3 * heads * D)), dtype)
    bias = rounded(chance.standard_normal(3 * heads * D), dtype) if with_bias else np.zeros(3 * heads * D)
    angles = chance.uniform(0, 60, (L // 4, 4, D // 2))
    cos, sin = (rounded(turn(angles), "float") for turn in (np.cos, np.sin))
    expected = picture_attention(*(torch.from_numpy(x) for x in (qkv + bias, cos, sin)), heads).numpy()
    inputs = {"qkv": (qkv, dtype), "bias": (bias, dtype) if with_bias else None, "cos": (cos, "float"), "sin": (sin, "float")}
    op = OneOp("PictureAttention", dtype, inputs, {"y": ((B, L, heads * D), dtype)}, num_heads=heads)
    assert error(op.run()["y"], expected) < 2 * LIMIT[dtype]


@DTYPES
def test_one_large_score(dtype: str) -> None:
    """The largest score comes late: what was added before is scaled down, and nothing overflows."""
    L, D = 300, 64
    qkv = np.zeros((1, L, 3 * D))
    qkv[..., 2 * D :] = np.arange(L)[:, None] % 7
    qkv[..., :D] = 8.0
    qkv[0, L - 2, D : 2 * D] = 16.0
    qkv, angles = rounded(qkv, dtype), np.zeros((L // 4, 4, D // 2))
    expected = picture_attention(*(torch.from_numpy(x) for x in (qkv, np.cos(angles), np.sin(angles))), 1).numpy()
    inputs = {"qkv": (qkv, dtype), "bias": None, "cos": (np.cos(angles), "float"), "sin": (np.sin(angles), "float")}
    op = OneOp("PictureAttention", dtype, inputs, {"y": ((1, L, D), dtype)}, num_heads=1)
    assert error(op.run()["y"], expected) < 2 * LIMIT[dtype]


@DTYPES
@pytest.mark.parametrize("K", [8, 768, 1024, 1152, 4096])
def test_residual_and_norm(dtype: str, K: int) -> None:
    chance = np.random.default_rng(K)
    rows = [rounded(chance.standard_normal((2, 37, K)), dtype) for _ in range(2)]
    bias, weight, offset = (rounded(chance.standard_normal(K), dtype) for _ in range(3))
    total = rows[0] + bias + rows[1]
    kept = rounded(total, dtype)
    normed = (kept - kept.mean(-1, keepdims=True)) / np.sqrt(kept.var(-1, keepdims=True) + 1e-6) * weight + offset
    inputs = {"x": rows[0], "bias": bias, "residual": rows[1], "weight": weight, "offset": offset}
    shapes = {"total": (total.shape, dtype), "y": (total.shape, dtype)}
    got = OneOp("ResidualNorm", dtype, {name: (value, dtype) for name, value in inputs.items()}, shapes, epsilon=1e-6).run()
    assert error(got["total"], total) < LIMIT[dtype]
    assert error(got["y"], normed) < 2 * LIMIT[dtype]


@DTYPES
def test_bias_and_gelu(dtype: str) -> None:
    chance = np.random.default_rng(1)
    x, bias = rounded(4 * chance.standard_normal((3, 50, 4304)), dtype), rounded(chance.standard_normal(4304), dtype)
    expected = torch.nn.functional.gelu(torch.from_numpy(x + bias), approximate="tanh").numpy()
    op = OneOp("BiasGelu", dtype, {"x": (x, dtype), "bias": (bias, dtype)}, {"y": (x.shape, dtype)})
    assert error(op.run()["y"], expected) < LIMIT[dtype]
