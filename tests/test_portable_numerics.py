"""The chunk form of the delta rule: its inverse against forward substitution, and the whole recurrence against float64, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch

from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.weights.expression import Reshaped, StoredWeight, add_weight
from qwen_export.plugins.decompose.decompose_delta_net import DeltaNetSizes, emit_gated_delta_net
from qwen_export.plugins.decompose.delta_rule import Recurrence, delta_rule
from qwen_export.plugins.decompose.triangular_inverse import (
    UNIT_ROUNDOFF,
    block_masks,
    error_bound,
    unit_lower_inverse,
    unit_lower_inverse_in_blocks,
)
from qwen_export.plugins.emitter import Emitter
from tests.support.standard_graphs import emitted, session

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32
Array = npt.NDArray[Any]


def correlated_keys(rng: np.random.Generator, count: int, size: int, correlation: float) -> Array:
    """Unit vectors with this mean inner product: 1 is one key over and over."""
    common = rng.standard_normal(size)
    common /= np.linalg.norm(common)
    own = rng.standard_normal((count, size))
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    keys = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own
    return keys / np.linalg.norm(keys, axis=1, keepdims=True)


def system(rng: np.random.Generator, size: int, correlation: float, beta: float, decay: float) -> Array:
    """I + A of a chunk, exactly as fp32 numbers: `beta` and `decay` are the largest of uniformly spread ones."""
    k = correlated_keys(rng, size, 128, correlation)
    b = rng.uniform(0.9 * beta, beta, size)
    g = np.log(rng.uniform(0.98 * decay, decay, size))
    total = np.cumsum(g)
    A = np.tril(b[:, None] * (k @ k.T) * np.exp(np.minimum(total[:, None] - total[None], 0)), -1)
    return A.astype(np.float32).astype(np.float64)


def forward_substitution(A: Array) -> Array:
    """fp32, row by row."""
    size = A.shape[0]
    X, A = np.eye(size, dtype=np.float32), A.astype(np.float32)
    for i in range(1, size):
        X[i, :i] = -(A[i, :i] @ X[:i, :i])
    return X


@pytest.mark.parametrize("size", [2, 3, 8, 13, 64])
def test_masks_select_the_strict_lower_triangle_once(size: int) -> None:
    assert np.array_equal(sum(block_masks(size)), np.tril(np.ones((size, size)), -1))


@pytest.mark.parametrize(("size", "block"), [(5, 0), (8, 0), (64, 0), (128, 0), (32, 16), (64, 16), (48, 16)])
def test_the_inverse_is_as_good_as_forward_substitution(size: int, block: int) -> None:
    """With masks alone and in blocks, over correlations from none to identical keys, beta to 1 and decays from strong to none."""
    cases = [(c, b, d) for c in (0.0, 0.3, 0.5, 0.9, 0.99, 1.0) for b in (0.1, 0.5, 0.9, 1.0) for d in (0.01, 0.5, 0.9, 0.999, 1.0)]
    rng = np.random.default_rng(size)
    A = np.stack([system(rng, size, *case) for case in cases])

    def build(emit: Emitter, x: dict[str, ir.Value]) -> list[ir.Value]:
        return [unit_lower_inverse_in_blocks(emit, x["a"], size, block) if block else unit_lower_inverse(emit, x["a"], size)]

    model = emitted({"a": ((2, len(cases) // 2, size, size), FLOAT)}, build)
    (X,) = session(model).run(None, {"a": A.astype(np.float32).reshape(2, -1, size, size)})
    X = X.reshape(A.shape)
    exact = np.linalg.inv(np.eye(size) + A)
    assert np.abs(exact).max() <= 1 + 1e-9, "entries of the inverse are products of contractions"
    ours = np.abs(X - exact).max(axis=(1, 2))
    theirs = np.array([np.abs(forward_substitution(a) - e).max() for a, e in zip(A, exact, strict=True)])
    assert ours.max() <= error_bound(size)
    assert ours.max() <= 16 * UNIT_ROUNDOFF
    assert (ours <= 4 * theirs + 4 * UNIT_ROUNDOFF).all()


def test_the_doubling_product_would_be_wrong() -> None:
    """Why the inverse is not (I - A)(I + A^2)(I + A^4)...: half-correlated keys are enough."""
    A = system(np.random.default_rng(0), 64, 0.5, 0.9, 1.0)
    exact, power = np.linalg.inv(np.eye(64) + A), A.astype(np.float32)
    X = np.eye(64, dtype=np.float32) - power
    for _ in range(5):
        power = power @ power
        X = X @ (np.eye(64, dtype=np.float32) + power)
    assert np.abs(X - exact).max() > 1, "entries of the inverse are at most 1"


def recurrence(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array) -> tuple[Array, Array]:
    """float64, token by token: q, k, v [H,L,D], g, beta [H,L], state [H,Dk,Dv]."""
    state, out = state.astype(np.float64), np.empty(v.shape)
    for t in range(q.shape[1]):
        state = state * np.exp(g[:, t])[:, None, None]
        u = beta[:, t, None] * (v[:, t] - np.einsum("hkv,hk->hv", state, k[:, t]))
        state = state + k[:, t, :, None] * u[:, None]
        out[:, t] = np.einsum("hkv,hk->hv", state, q[:, t])
    return out, state


DECAYS = {
    "none": lambda rng, shape: np.zeros(shape),
    "almost none": lambda rng, shape: -rng.uniform(0, 1e-4, shape),
    "usual": lambda rng, shape: -rng.exponential(0.1, shape),
    "strong": lambda rng, shape: -rng.uniform(5, 40, shape),
    "strong and none": lambda rng, shape: np.where(rng.random(shape) < 0.1, -60.0, -1e-3 * rng.random(shape)),
}


@pytest.mark.parametrize("decay", DECAYS)
def test_8192_tokens_in_chunks_against_float64(decay: str) -> None:
    H, L, D, C, correlation = 2, 8192, 32, 64, 0.7
    rng = np.random.default_rng(len(decay))
    k = np.stack([correlated_keys(rng, L, D, correlation) for _ in range(H)]).astype(np.float32)
    q = (correlated_keys(rng, H * L, D, correlation).reshape(H, L, D) * D**-0.5).astype(np.float32)
    v = rng.standard_normal((H, L, D)).astype(np.float32)
    g = DECAYS[decay](rng, (H, L)).astype(np.float32)
    beta = rng.uniform(0.5, 1, (H, L)).astype(np.float32)
    data = {"q": q, "k": k, "v": v, "g": g[..., None], "beta": beta[..., None]}
    shapes = {name: ((1, H, C, x.shape[-1]), FLOAT) for name, x in data.items()} | {"state": ((1, H, D, D), FLOAT)}
    run = session(emitted(shapes, lambda emit, x: delta_rule(emit, Recurrence(**x, length=C))))
    state, out = np.zeros((1, H, D, D), np.float32), []
    for start in range(0, L, C):
        o, state = run.run(None, {n: x[None, :, start : start + C] for n, x in data.items()} | {"state": state})
        out.append(o[0])
    expected, expected_state = recurrence(q, k, v, g, beta, np.zeros((H, D, D)))
    scale = np.abs(expected_state).max()
    assert np.abs(np.concatenate(out, axis=1) - expected).max() <= 2e-5 * max(1, scale)
    assert np.abs(state[0] - expected_state).max() <= 2e-5 * max(1, scale)


def test_weak_decay_after_strong_decay_keeps_its_digits() -> None:
    """exp(G_i - G_j) of two sums near -3800 would be off by 1e-4; sums over the range itself are not."""
    H, L, D = 1, 64, 16
    rng = np.random.default_rng(0)
    g = np.full((H, L), -0.01, np.float32)
    g[:, :32] = -119.7
    k = correlated_keys(rng, L, D, 0.5)[None].astype(np.float32)
    q, v, beta = k, rng.standard_normal((H, L, D)).astype(np.float32), np.full((H, L), 0.7, np.float32)
    shapes = (
        dict.fromkeys("qkv", ((1, H, L, D), FLOAT)) | dict.fromkeys(("g", "beta"), ((1, H, L, 1), FLOAT)) | {"state": ((1, H, D, D), FLOAT)}
    )
    model = emitted(shapes, lambda emit, x: delta_rule(emit, Recurrence(**x, length=L)))
    feeds = {"q": q[None], "k": k[None], "v": v[None], "g": g[None, ..., None], "beta": beta[None, ..., None]}
    o, _ = session(model).run(None, feeds | {"state": np.zeros((1, H, D, D), np.float32)})
    expected, _ = recurrence(q, k, v, g, beta, np.zeros((H, D, D)))
    assert np.abs(o[0] - expected).max() <= 3e-6


# The whole op against its eager body


@pytest.mark.parametrize(("T", "P", "Hk", "Hv"), [(1, 0, 2, 2), (4, 4, 2, 4), (6, 3, 1, 3), (64, 0, 2, 2), (16, 0, 1, 4)])
def test_transactions_are_the_eager_ones(T: int, P: int, Hk: int, Hv: int) -> None:
    """Every number of accepted and committed tokens, in one graph."""
    D, K = 16, 4
    C = (2 * Hk + Hv) * D
    rng = np.random.default_rng([T, P])

    def some(*shape: int, scale: float = 1.0) -> Array:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    weights = {"conv": some(C, K, scale=0.5), "a_log": some(Hv), "dt": some(Hv), "norm": 1 + some(D, scale=0.1)}
    data = {"qkv": some(1, T, C), "z": some(1, T, Hv * D), "b": some(1, T, Hv), "a": some(1, T, Hv), "conv_history": some(1, K - 1, C)}
    data["state"] = some(1, Hv, D, D, scale=0.3)
    if P:
        data |= {"pending_qkv": some(1, P, C), "pending_b": some(1, P, Hv), "pending_a": some(1, P, Hv)}
    counts = {"accepted": P > 0, "commit": P > 0 or T > 1}

    def build(emit: Emitter, values: dict[str, ir.Value]) -> list[ir.Value]:
        def stored(name: str, shape: tuple[int, ...]) -> ir.Value:
            return add_weight(emit.graph, name, StoredWeight(name, shape, FLOAT))

        conv = add_weight(emit.graph, "conv.view", Reshaped(StoredWeight("conv", (C, K), FLOAT), (C, K)))
        given: dict[str, ir.Value | None] = dict(values)
        given |= {"conv_weight": conv, "a_log": stored("a_log", (Hv,)), "dt_bias": stored("dt", (Hv,)), "norm": stored("norm", (D,))}
        return list(emit_gated_delta_net(emit, given, DeltaNetSizes(T, P, Hk, Hv, D, D, K), 1e-6, FLOAT))

    shapes = {name: (x.shape, FLOAT) for name, x in data.items()} | {name: ((1,), INT32) for name, used in counts.items() if used}
    run = session(emitted(shapes, build, weights))
    tensor = {name: torch.from_numpy(x) for name, x in (data | weights).items()}
    none = [torch.zeros(1, 0, C), torch.zeros(1, 0, Hv), torch.zeros(1, 0, Hv)]
    pending = [tensor[name] for name in ("pending_qkv", "pending_b", "pending_a")] if P else none
    for accepted in range(P + 1):
        for commit in sorted({0, 1, T // 2, T}) if counts["commit"] else [T]:
            feeds = {"accepted": np.array([accepted], np.int32), "commit": np.array([commit], np.int32)}
            got = run.run(None, data | {name: feeds[name] for name, used in counts.items() if used})
            first = [tensor[name] for name in ("qkv", "z", "b", "a", "conv", "a_log", "dt", "norm", "conv_history", "state")]
            expected = gated_delta_net(*first, *pending, torch.tensor([accepted]), torch.tensor([commit]), Hk, 1e-6)
            rows = commit or T  # outputs behind `commit` are unspecified unless nothing is committed
            assert np.abs(got[0][:, :rows] - expected[0].numpy()[:, :rows]).max() < 2e-5
            assert np.array_equal(got[1], expected[1].numpy())
            assert np.abs(got[2] - expected[2].numpy()).max() < 2e-5
