"""The CUDA plugin: each op against float64 on a device. test_native_plugin_build.py has where a build uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qwen_export.runtimes.memory.buffers import as_bytes
from tests.support.cuda_ops import LIMIT, OneOp, error, normalized, rounded, silu

Array = npt.NDArray[Any]
gpu = pytest.mark.gpu
HEADS = pytest.mark.parametrize("D", [64, 128])
DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 64]
SHAPES = [(8, 8), (24, 40), (1024, 3584), (1024, 2048), (8224, 1024), (3584, 1032)]


@gpu
@DTYPES
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("extras", ["", "residual", "norm", "residual norm"])
def test_linear(dtype: str, N: int, K: int, extras: str) -> None:
    rng = np.random.default_rng(N + K)
    for M in ROWS if N * K < 1 << 23 else [1, 8, 9, 33]:
        check_linear(rng, dtype, M, N, K, extras)


@gpu
@DTYPES
@pytest.mark.parametrize("M", [2048, 1537, 700, 513, 129, 17])
def test_linear_of_a_prefill(dtype: str, M: int) -> None:
    """Numbers of rows between two classes have the algorithm of the larger one."""
    check_linear(np.random.default_rng(0), dtype, M, 1024, 2048, "residual norm")


def check_linear(rng: np.random.Generator, dtype: str, M: int, N: int, K: int, extras: str) -> None:
    x, w = rounded(rng.normal(size=(1, M, K)), dtype), rounded(rng.normal(size=(N, K)) / np.sqrt(K), dtype)
    residual = rounded(rng.normal(size=(1, M, N)), dtype) if "residual" in extras else None
    norm = rounded(1 + rng.normal(size=K) / 4, dtype) if "norm" in extras else None
    optional = {name: (value, dtype) if value is not None else None for name, value in (("residual", residual), ("norm", norm))}
    op = OneOp("Linear", dtype, {"x": (x, dtype), "w": (w, dtype)} | optional, {"y": ((1, M, N), dtype)}, epsilon=1e-6)
    expected = (x if norm is None else normalized(x, norm, dtype)) @ w.T + (0 if residual is None else residual)
    assert error(op.run()["y"], expected) < LIMIT[dtype], (M, N, K)


@gpu
@DTYPES
@pytest.mark.parametrize(("N", "K"), [(8, 8), (40, 24), (3584, 1024), (1032, 2560)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_swiglu(dtype: str, N: int, K: int, with_norm: bool) -> None:
    rng = np.random.default_rng(N + K)
    for M in [*ROWS, 2048] if N == 3584 else ROWS:
        x, w = rounded(rng.normal(size=(1, M, K)), dtype), rounded(rng.normal(size=(2 * N, K)) / np.sqrt(K), dtype)
        norm = rounded(1 + rng.normal(size=K) / 4, dtype)
        inputs = {"x": (x, dtype), "w": (w, dtype), "norm": (norm, dtype) if with_norm else None}
        op = OneOp("SwiGlu", dtype, inputs, {"y": ((1, M, N), dtype)}, epsilon=1e-6)
        h = (normalized(x, norm, dtype) if with_norm else x) @ w.T
        # More rows go through a gate and up of the element type.
        assert error(op.run()["y"], silu(h[..., :N]) * h[..., N:]) < 2 * LIMIT[dtype], (M, N, K)


def delta_net_inputs(rng: np.random.Generator, dtype: str, B: int, T: int, Hk: int, Hv: int, D: int) -> dict[str, tuple[Array, str]]:
    """Keys of a head share a direction, betas reach 1 and decays reach 1: what a recurrence gets wrong first."""
    C, wide = (2 * Hk + Hv) * D, (2 * Hk + 2 * Hv) * D
    packed = rng.normal(size=(B, T, wide + 2 * Hv))
    packed[..., :C] += 0.7 * rng.normal(size=C)
    packed[..., wide : wide + Hv] -= 2
    packed[..., wide + Hv :] += 2
    tensors = {
        "packed": packed,
        "conv": rng.normal(size=(C, 4)) / 2,
        "norm": 1 + rng.normal(size=D) / 4,
        "history": rng.normal(size=(B, 3, C)),
    }
    fp32 = {"a_log": rng.normal(size=Hv), "dt_bias": rng.normal(size=Hv), "state": rng.normal(size=(B, Hv, D, D))}
    given = {name: (rounded(value, dtype), dtype) for name, value in tensors.items()}
    given |= {name: (rounded(value, "float"), "float") for name, value in fp32.items()}
    return {name: given[name] for name in ("packed", "conv", "a_log", "dt_bias", "norm", "history", "state")}


def delta_net_reference(given: dict[str, tuple[Array, str]], Hk: int, Hv: int) -> dict[str, Array]:
    packed, conv, a_log, dt_bias, norm, history, state = (value for value, _ in given.values())
    B, T, _ = packed.shape
    C, D = history.shape[2], state.shape[3]
    rows = np.concatenate([history, packed[..., :C]], axis=1)
    u = silu(sum(rows[:, i : i + T] * conv[:, i] for i in range(4)))
    z, a, b = np.split(packed[..., C:], [Hv * D, Hv * D + Hv], axis=2)
    q, k, v = (part.reshape(B, T, -1, D) for part in np.split(u, [Hk * D, 2 * Hk * D], axis=2))
    q, k = (np.repeat(x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6), Hv // Hk, axis=2) for x in (q, k))
    decay, beta = np.exp(-np.exp(a_log) * np.logaddexp(0, a + dt_bias)), 1 / (1 + np.exp(-b))
    S, o = state.copy(), np.empty((B, T, Hv, D))
    for t in range(T):
        S = S * decay[:, t, :, None, None]
        delta = beta[:, t, :, None] * (v[:, t] - np.einsum("bhvk,bhk->bhv", S, k[:, t]))
        S = S + delta[..., None] * k[:, t, :, None, :]
        o[:, t] = np.einsum("bhvk,bhk->bhv", S, q[:, t]) / np.sqrt(D)
    y = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * norm
    return {"y": y.reshape(B, T, -1) * silu(z), "history_out": rows[:, T:], "state_out": S}


def delta_net_op(dtype: str, given: dict[str, tuple[Array, str]], Hk: int) -> OneOp:
    B, T, _ = given["packed"][0].shape
    _, Hv, _, D = given["state"][0].shape
    outputs = {
        "y": ((B, T, Hv * D), dtype),
        "history_out": (given["history"][0].shape, dtype),
        "state_out": (given["state"][0].shape, "float"),
    }
    return OneOp("DeltaNet", dtype, dict(given), outputs, key_heads=Hk, epsilon=1e-6)


@gpu
@DTYPES
@pytest.mark.parametrize(
    ("Hk", "Hv", "D"), [(2, 2, 128), (2, 4, 128), (1, 3, 128), (16, 16, 128), (16, 48, 128), (2, 4, 64), (1, 3, 64), (16, 16, 64)]
)
def test_delta_net(dtype: str, Hk: int, Hv: int, D: int) -> None:
    rng = np.random.default_rng(Hv)
    for B, T in [(1, t) for t in range(1, 11)] + [(2, 1), (3, 5), (2, 17), (1, 64), (3, 100)]:
        given = delta_net_inputs(rng, dtype, B, T, Hk, Hv, D)
        got, expected = delta_net_op(dtype, given, Hk).run(), delta_net_reference(given, Hk, Hv)
        assert error(got["y"], expected["y"]) < LIMIT[dtype], (B, T)
        assert error(got["state_out"], expected["state_out"]) < 1e-5, (B, T)
        assert np.array_equal(got["history_out"], expected["history_out"]), (B, T)


@gpu
@HEADS
def test_delta_net_of_a_prefill(D: int) -> None:
    given = delta_net_inputs(np.random.default_rng(0), "float16", 1, 2048, 2, 4, D)
    got, expected = delta_net_op("float16", given, 2).run(), delta_net_reference(given, 2, 4)
    assert error(got["y"], expected["y"]) < LIMIT["float16"] and error(got["state_out"], expected["state_out"]) < 1e-5


@gpu
@DTYPES
@HEADS
@pytest.mark.parametrize("T", [1, 4, 20])
def test_delta_net_writes_its_state_in_place(dtype: str, T: int, D: int) -> None:
    """Value heads share the history of their key head, and some block is the last to read it."""
    given = delta_net_inputs(np.random.default_rng(T), dtype, 2, T, 16, 48, D)
    apart = delta_net_op(dtype, given, 16).run()
    op = delta_net_op(dtype, given, 16)
    op.bind_outputs(history_out=op.inputs["history"], state_out=op.inputs["state"])
    together = op.run(poison=False)
    for name in apart:
        assert np.array_equal(apart[name], together[name]), name


# ---- DeltaNet as a transaction ----

FLOATS = pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
Given = dict[str, tuple[Array, str]]


def with_transaction(rng: np.random.Generator, given: Given, P: int, accepted: list[int], commit: list[int]) -> Given:
    """The inputs with `P` pending rows of the same kind; those that were not accepted are NaN."""
    (packed, dtype), (_, Hv, _, D) = given["packed"], given["state"][0].shape
    Hk = (given["history"][0].shape[2] // D - Hv) // 2
    pending = delta_net_inputs(rng, dtype, packed.shape[0], P, Hk, Hv, D)["packed"][0]
    for row, kept in zip(pending, accepted, strict=True):
        row[kept:] = np.nan
    return given | {"pending": (pending, dtype), "accepted": (np.array(accepted), "int64"), "commit": (np.array(commit), "int64")}


def eager(given: Given, Hk: int) -> dict[str, Array]:
    """The op itself, in float64. The kernel's state is V-major."""
    import torch

    from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net

    x = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, (value, _) in given.items()}
    (_, Hv, _, D), C = x["state"].shape, x["history"].shape[2]
    sizes = [C, Hv * D, Hv, Hv]
    (qkv, z, a, b), (pending_qkv, _, pending_a, pending_b) = x["packed"].split(sizes, 2), x["pending"].split(sizes, 2)
    weights = [x[name] for name in ("conv", "a_log", "dt_bias", "norm", "history")]
    pending = [pending_qkv, pending_b, pending_a, x["accepted"], x["commit"]]
    y, history, state = gated_delta_net(qkv, z, b, a, *weights, x["state"].mT.contiguous(), *pending, Hk, 1e-6)
    return {"y": y.numpy(), "history_out": history.numpy(), "state_out": state.mT.numpy()}


def check_transaction(got: dict[str, Array], given: Given, Hk: int, label: object) -> None:
    expected, (commit, _), dtype = eager(given, Hk), given["commit"], given["packed"][1]
    for i, kept in enumerate(commit):
        asked = slice(int(kept) or None)  # outputs behind a commit in the middle are unspecified
        assert error(got["y"][i, asked], expected["y"][i, asked]) < LIMIT[dtype], label
    assert error(got["state_out"], expected["state_out"]) < 1e-5, label
    assert np.array_equal(got["history_out"], expected["history_out"]), label


# T, P, accepted, commit
TRANSACTIONS = [
    (1, 0, [0], [1]),  # plain decoding of a bundle that could speculate
    (1, 9, [0], [1]),
    (1, 9, [1], [0]),
    (9, 9, [0], [0]),
    (9, 9, [9], [0]),
    (9, 9, [4], [0]),
    (4, 3, [3, 0, 1], [4, 0, 2]),
    (5, 9, [2, 9], [5, 3]),
    (2, 24, [24], [1]),  # more than one pass over what is pending
    (3, 24, [11, 18], [0, 3]),
    (10, 9, [9], [10]),  # a prompt part after a round
    (37, 9, [3, 0], [37, 37]),
    (37, 4, [4, 0, 2], [20, 1, 37]),
    (20, 4, [0, 3], [0, 0]),  # a long verify
    (33, 0, [0, 0], [33, 16]),
]


@gpu
@FLOATS
@pytest.mark.parametrize(("Hk", "Hv", "D"), [(2, 2, 128), (1, 3, 128), (16, 32, 128), (2, 4, 64), (1, 3, 64)])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_transaction_is_the_op(dtype: str, Hk: int, Hv: int, D: int, in_place: bool) -> None:
    rng = np.random.default_rng(Hv)
    for T, P, accepted, commit in TRANSACTIONS:
        given = with_transaction(rng, delta_net_inputs(rng, dtype, len(commit), T, Hk, Hv, D), P, accepted, commit)
        op = delta_net_op(dtype, given, Hk)
        if in_place:
            op.bind_outputs(history_out=op.inputs["history"], state_out=op.inputs["state"])
        check_transaction(op.run(poison=not in_place), given, Hk, (T, P, accepted, commit))


@gpu
@FLOATS
@pytest.mark.parametrize(("Hk", "Hv", "D"), [(16, 32, 128), (16, 48, 64)])
@pytest.mark.parametrize(("T", "P"), [(1, 0), (1, 3), (4, 4), (9, 9)])
def test_a_sequence_has_the_same_bits_in_company(dtype: str, Hk: int, Hv: int, D: int, T: int, P: int) -> None:
    """Many heads share processors, those of one sequence have one each."""
    rng, B = np.random.default_rng([T, P, Hv]), 12
    accepted, commit = rng.integers(0, P + 1, B).tolist(), rng.integers(0, T + 1, B).tolist()
    given = with_transaction(rng, delta_net_inputs(rng, dtype, B, T, Hk, Hv, D), P, accepted, commit)
    op = delta_net_op(dtype, given, Hk)
    op.bind_outputs(history_out=op.inputs["history"], state_out=op.inputs["state"])
    together = op.run(poison=False)
    for b in (0, 5, B - 1):
        one = {n: (x[b : b + 1] if x.shape[:1] == (B,) else x, kind) for n, (x, kind) in given.items()}
        for name, alone in delta_net_op(dtype, one, Hk).run().items():
            assert np.array_equal(alone[0], together[name][b]), (name, b)


@gpu
@FLOATS
@HEADS
@pytest.mark.parametrize("T", [1, 9, 24])
def test_controls_are_read_by_the_device(dtype: str, T: int, D: int) -> None:
    """A recorded call is replayed with other numbers of accepted and committed tokens."""
    rng, Hk, Hv = np.random.default_rng(T), 2, 4
    given = with_transaction(rng, delta_net_inputs(rng, dtype, 2, T, Hk, Hv, D), 9, [9, 9], [T, T])
    op = delta_net_op(dtype, given, Hk)
    for _ in op.replays():
        pass
    for accepted, commit in [([0, 9], [0, T]), ([9, 1], [T, 0]), ([5, 0], [1, T])]:
        op.inputs["accepted"].write(as_bytes(np.array(accepted)))
        op.inputs["commit"].write(as_bytes(np.array(commit)))
        now = given | {"accepted": (np.array(accepted), "int64"), "commit": (np.array(commit), "int64")}
        check_transaction(op.run(recorded=True), now, Hk, (accepted, commit))


@gpu
@FLOATS
@HEADS
def test_speculative_rounds_are_plain_decoding(dtype: str, D: int) -> None:
    """Drafts of changing length, of which some tokens are kept: outputs of kept tokens, state and history are those of one token a call, to
    the bit."""
    rng, Hk, Hv, P = np.random.default_rng(0), 2, 4, 9
    stream = delta_net_inputs(rng, dtype, 1, 60, Hk, Hv, D)
    tokens = stream["packed"][0]
    wrong = delta_net_inputs(rng, dtype, 1, P, Hk, Hv, D)["packed"][0]
    none = (np.full((1, P, tokens.shape[2]), np.nan), dtype)
    state = {name: stream[name] for name in ("history", "state")}

    def call(packed: Array, state: Given, pending: tuple[Array, str], accepted: int, commit: int) -> tuple[Array, Given]:
        controls = {"accepted": (np.array([accepted]), "int64"), "commit": (np.array([commit]), "int64")}
        got = delta_net_op(dtype, stream | state | {"packed": (packed, dtype), "pending": pending} | controls, Hk).run()
        return got["y"], {"history": (got["history_out"], dtype), "state": (got["state_out"], "float")}

    plain, at = [], [state]
    for t in range(tokens.shape[1]):
        y, after = call(tokens[:, t : t + 1], at[-1], none, 0, 1)
        plain.append(y[0, 0])
        at.append(after)

    start = kept = 0
    pending = none
    for drafted in (0, 8, 8, 3, 1, 8, 5, 2, 8):
        right = int(rng.integers(0, drafted + 1))
        packed = tokens[:, start : start + drafted + 1].copy()
        packed[:, 1 + right :] = wrong[:, : drafted - right]
        y, state = call(packed, state, pending, kept, 0)
        for name in state:
            assert np.array_equal(state[name][0], at[start][name][0]), name
        assert np.array_equal(y[0, : right + 1], plain[start : start + right + 1])
        padding = np.full((1, P - packed.shape[1], packed.shape[2]), np.nan)
        pending, kept, start = (np.concatenate([packed, padding], axis=1), dtype), right + 1, start + right + 1
    y, state = call(tokens[:, start : start + 1], state, pending, kept, 1)
    assert np.array_equal(y[0, 0], plain[start])
    for name in state:
        assert np.array_equal(state[name][0], at[start + 1][name][0]), name


@gpu
@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 8, 40])
def test_a_replay_gives_what_a_plain_run_gives(dtype: str, rows: int) -> None:
    rng = np.random.default_rng(rows)

    def tensor(*shape: int) -> tuple[Array, str]:
        return rng.normal(size=shape) / 8, dtype

    makes: list[Callable[[], OneOp]] = [
        lambda: OneOp(
            "Linear",
            dtype,
            {"x": tensor(1, rows, 1024), "w": tensor(1024, 1024), "residual": tensor(1, rows, 1024), "norm": tensor(1024)},
            {"y": ((1, rows, 1024), dtype)},
            epsilon=1e-6,
        ),
        lambda: OneOp(
            "SwiGlu",
            dtype,
            {"x": tensor(1, rows, 1024), "w": tensor(7168, 1024), "norm": tensor(1024)},
            {"y": ((1, rows, 3584), dtype)},
            epsilon=1e-6,
        ),
        lambda: delta_net_op(dtype, delta_net_inputs(rng, dtype, 1, rows, 16, 32, 128), 16),
        lambda: delta_net_op(dtype, delta_net_inputs(rng, dtype, 1, rows, 2, 4, 64), 2),
    ]
    for make in makes:
        first, *others = make().replays()
        for other in others:
            for name in first:
                assert np.array_equal(first[name], other[name]), name
