"""The ops against references of their own: plain loops in float64, written from the equations."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.ops.op_table import OPS
from qwen_export.graphs.ops.rms_norm_op import rms_norm
from tests.support.op_inputs import (
    DK,
    DV,
    EPS,
    OPCHECKS,
    Array,
    Mixer,
    Tokens,
    close,
    delta_net_arguments,
    make_attention,
    make_mixer,
    make_state,
    make_tokens,
    noise,
    sigmoid,
    silu,
    tensor,
)

# ---- gated_delta_net


def reference(mixer: Mixer, x: Tokens, i: int, history: Array, state: Array) -> tuple[Array, list[Array], list[Array]]:
    """Sequence i read token by token: y [T,Hv*Dv], and the history and the state after 0, 1, .. T tokens.

    S_t = e^g (I - beta k k^T) S_{t-1} + beta k v^T,  o = S_t^T q  (eq. 10 of the paper, multiplied out)."""
    Hk, Hv, K = mixer.key_heads, mixer.value_heads, mixer.taps
    window, S = history[i].copy(), state[i].copy()
    y, histories, states = [], [window.copy()], [S.copy()]
    for t in range(x.qkv.shape[1]):
        rows = np.vstack([window, x.qkv[i, t]])
        u = silu(np.array([sum(rows[tap, c] * mixer.conv_weight[c, tap] for tap in range(K)) for c in range(mixer.channels)]))
        out = []
        for h in range(Hv):
            j = h * Hk // Hv
            q, k = u[j * DK : (j + 1) * DK], u[(Hk + j) * DK : (Hk + j + 1) * DK]
            v = u[2 * Hk * DK + h * DV : 2 * Hk * DK + (h + 1) * DV]
            q, k = q / np.sqrt(q @ q + 1e-6) / np.sqrt(DK), k / np.sqrt(k @ k + 1e-6)
            decay = np.exp(-np.exp(mixer.a_log[h]) * np.log1p(np.exp(x.a[i, t, h] + mixer.dt_bias[h])))
            beta = sigmoid(x.b[i, t, h])
            S[h] = decay * (np.eye(DK) - beta * np.outer(k, k)) @ S[h] + beta * np.outer(k, v)
            o = S[h].T @ q
            gate = silu(x.z[i, t, h * DV : (h + 1) * DV])
            out.append(o / np.sqrt(np.mean(o**2) + EPS) * mixer.norm * gate)
        window = rows[1:]
        y.append(np.concatenate(out))
        histories.append(window.copy())
        states.append(S.copy())
    return np.array(y).reshape(-1, Hv * DV), histories, states


def run(
    mixer: Mixer,
    x: Tokens,
    history: Array | torch.Tensor,
    state: Array | torch.Tensor,
    pending: Tokens | None = None,
    accepted: Any = None,
    commit: Any = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return gated_delta_net(*delta_net_arguments(mixer, x, history, state, pending, accepted, commit, dtype))


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8])
def test_delta_net_equals_the_sequential_reference(ratio: int) -> None:
    mixer = make_mixer(ratio)
    x, (history, state) = make_tokens(mixer, 2, 7), make_state(mixer, 2)
    y, next_history, next_state = run(mixer, x, history, state)
    for i in range(2):
        expected, histories, states = reference(mixer, x, i, history, state)
        close(y[i], expected, 1e-11)
        close(next_history[i], histories[-1], 0)
        close(next_state[i], states[-1], 1e-12)


@st.composite
def transactions(draw: st.DrawFn) -> dict[str, Any]:
    B, P, T = draw(st.integers(1, 3)), draw(st.integers(0, 4)), draw(st.integers(1, 5))
    return {
        "ratio": draw(st.sampled_from([1, 2, 3])),
        "taps": draw(st.integers(2, 4)),
        "P": P,
        "T": T,
        "accepted": draw(st.lists(st.integers(0, P), min_size=B, max_size=B)),
        "commit": draw(st.lists(st.integers(0, T), min_size=B, max_size=B)),
    }


@given(transactions())
@example({"ratio": 1, "taps": 4, "P": 4, "T": 5, "accepted": [0, 2, 4], "commit": [0, 0, 0]})  # a speculative verify
@example({"ratio": 2, "taps": 4, "P": 0, "T": 5, "accepted": [0, 0], "commit": [5, 2]})  # a ragged prefill
@settings(max_examples=60, deadline=None)
def test_a_transaction_equals_plain_processing(case: dict[str, Any]) -> None:
    """The accepted pending tokens and the committed new ones enter the state and nothing else does: the rest is NaN here."""
    mixer, B, T = make_mixer(case["ratio"], 1, case["taps"]), len(case["commit"]), case["T"]
    pending, new, (history, state) = make_tokens(mixer, B, case["P"], 30), make_tokens(mixer, B, T, 40), make_state(mixer, B)
    for i in range(B):
        rejected, forgotten = case["accepted"][i], case["commit"][i] or T
        for values, start in ((pending, rejected), (new, forgotten)):
            for part in (values.qkv, values.b, values.a):
                part[i, start:] = np.nan
    y, next_history, next_state = run(mixer, new, history, state, pending, case["accepted"], case["commit"])
    for i, (kept, done) in enumerate(zip(case["accepted"], case["commit"], strict=True)):
        both = [np.concatenate([getattr(pending, n)[i : i + 1, :kept], getattr(new, n)[i : i + 1]], 1) for n in ("qkv", "z", "b", "a")]
        expected, histories, states = reference(mixer, Tokens(*both), 0, history[i : i + 1], state[i : i + 1])
        close(y[i, : done or T], expected[kept : kept + (done or T)], 1e-10)
        close(next_history[i], histories[kept + done], 0)
        close(next_state[i], states[kept + done], 1e-11)


def test_decoding_by_verify_and_accept_equals_plain_decoding() -> None:
    """Three speculative rounds (commit 0, then accept some of it) leave what reading the kept tokens one by one leaves."""
    mixer = make_mixer(2)
    history, state = make_state(mixer, 1)
    left, pending, accepted = (tensor(history), tensor(state)), make_tokens(mixer, 1, 0), [0]
    kept: list[Tokens] = []
    for round_, take in enumerate((3, 1, 2)):
        new = make_tokens(mixer, 1, 4, 50 + 10 * round_)
        y, *after = run(mixer, new, *left, pending, accepted, [0])
        left = (after[0], after[1])
        kept.append(new[:take])
        pending, accepted = new, [take]
    _, next_history, next_state = run(mixer, make_tokens(mixer, 1, 1, 90), *left, pending, accepted, [0])
    read = Tokens(*(np.concatenate([getattr(part, n) for part in kept], 1) for n in ("qkv", "z", "b", "a")))
    expected, histories, states = reference(mixer, read, 0, history, state)
    close(y[0, :2], expected[-2:], 1e-11)
    close(next_history[0], histories[-1], 0)
    close(next_state[0], states[-1], 1e-12)


@pytest.mark.parametrize(("accepted", "commit"), [([3], [1]), ([-1], [1]), ([0], [5]), ([0], [-1])])
def test_invalid_counts_raise(accepted: list[int], commit: list[int]) -> None:
    mixer = make_mixer(1)
    with pytest.raises(ValueError, match=r"accepted must be in 0\.\.2 and commit in 0\.\.4"):
        run(mixer, make_tokens(mixer, 1, 4), *make_state(mixer, 1), make_tokens(mixer, 1, 2), accepted, commit)


def test_prefill_may_be_split_anywhere() -> None:
    mixer = make_mixer(3)
    x, before = make_tokens(mixer, 2, 9), make_state(mixer, 2)
    whole = run(mixer, x, *before)
    for cuts in [*([c] for c in range(1, 9)), list(range(1, 9)), [2, 3, 7]]:
        parts: list[torch.Tensor] = []
        left: tuple[Any, Any] = before
        for start, stop in zip([0, *cuts], [*cuts, 9], strict=True):
            y, *after = run(mixer, x[start:stop], *left)
            parts, left = [*parts, y], (after[0], after[1])
        for got, expected in zip((torch.cat(parts, 1), *left), whole, strict=True):
            close(got, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_correlated_keys_strong_writes_and_long_memory(dtype: torch.dtype) -> None:
    """Keys nearly equal, beta and decay near 1, for 64 tokens: where chunked forms of the recurrence go wrong."""
    mixer = make_mixer(2)
    x, (history, state) = make_tokens(mixer, 1, 64), make_state(mixer, 1)
    keys = slice(mixer.key_heads * DK, 2 * mixer.key_heads * DK)
    x.qkv[:, :, keys] = np.sign(mixer.conv_weight[keys, -1]) * 2 + 1e-3 * x.qkv[:, :, keys]
    x.b[:] = 8 + 0.1 * x.b
    x.a[:] = -12 + 0.1 * x.a
    expected, _, states = reference(mixer, x, 0, history, state)
    y, _, next_state = run(mixer, x, history, state, dtype=dtype)
    close(y[0], expected, 1e-10 if dtype == torch.float64 else 5e-4)
    close(next_state[0], states[-1], 1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_activations_keep_an_fp32_state(dtype: torch.dtype) -> None:
    mixer = make_mixer(2)
    x, (history, state) = make_tokens(mixer, 1, 6), make_state(mixer, 1)
    y, next_history, next_state = run(mixer, x, history, state, dtype=dtype)
    assert (y.dtype, next_history.dtype, next_state.dtype) == (dtype, dtype, torch.float32)
    rounded = dataclasses.replace(
        mixer,
        conv_weight=tensor(mixer.conv_weight, dtype).double().numpy(),
        norm=tensor(mixer.norm, dtype).double().numpy(),
    )
    inputs = Tokens(*(tensor(v, dtype).double().numpy() for v in (x.qkv, x.z, x.b, x.a)))
    expected, _, states = reference(rounded, inputs, 0, tensor(history, dtype).double().numpy(), state)
    unit = torch.finfo(dtype).eps
    assert np.abs(y[0].double().numpy() - expected).max() < 40 * unit
    assert np.abs(next_state[0].double().numpy() - states[-1]).max() < 8 * unit
    # No write, no decay: every bit of the fp32 state survives, also those a half-precision value could not hold.
    x.b[:], x.a[:] = -40, -80
    fine = torch.full((1, 4, DK, DV), 1 + 2.0**-20)
    *_, unchanged = run(mixer, x, history, fine, dtype=dtype)
    assert torch.equal(unchanged, fine)


# ---- rms_norm


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_rms_norm(offset: float, dtype: torch.dtype, tolerance: float) -> None:
    x, weight = tensor(3 * noise(70, 2, 3, 16), dtype), tensor(0.3 * noise(71, 16), dtype)
    y = rms_norm(x, weight, EPS, offset)
    assert y.dtype == dtype
    wide, scale = x.double().numpy(), weight.double().numpy() + offset
    expected = np.array([[row / np.sqrt(sum(v * v for v in row) / 16 + EPS) * scale for row in rows] for rows in wide])
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=tolerance, atol=1e-12)


def test_rms_norm_has_its_statistics_in_fp32() -> None:
    """Squares of 300 overflow fp16; squares of 1e-5 underflow it."""
    for size in (300.0, 1e-5):
        y = rms_norm(torch.full((1, 8), size, dtype=torch.float16), torch.zeros(8, dtype=torch.float16), 1e-12, 1.0)
        torch.testing.assert_close(y, torch.ones_like(y), atol=2e-2, rtol=0)


# ---- fakes


def example_arguments(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    if name == "rms_norm":
        return tensor(noise(70, 2, 3, 16), dtype), tensor(noise(71, 16), dtype), EPS, 1.0
    if name == "moe":
        x, logits = tensor(noise(80, 2, 3, 16), dtype), tensor(noise(81, 2, 3, 6), dtype)
        return x, logits, tensor(noise(82, 6, 8, 16), dtype), tensor(noise(83, 6, 16, 4), dtype), 2
    if name == "gated_attention":
        return make_attention(4).arguments(dtype)
    if name == "picture_attention":
        angles = [tensor(noise(seed, 3, 2, 4), torch.float32) for seed in (90, 91)]
        return tensor(noise(92, 2, 6, 3 * 2 * 8), dtype), *angles, 2
    if name == "place_features":
        return tensor(noise(93, 2, 3, 16), dtype), tensor(noise(94, 2, 16), dtype), torch.tensor([1, 4])
    mixer = make_mixer(2)
    return delta_net_arguments(mixer, make_tokens(mixer, 2, 3), *make_state(mixer, 2), make_tokens(mixer, 2, 2), [0, 2], [0, 3], dtype)


@pytest.mark.parametrize("name", sorted(OPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_fake_agrees_with_the_body(name: str, dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides of the traced op are those of the real one, and the schema tells the truth about mutation."""
    torch.library.opcheck(OPS[name].overload, example_arguments(name, dtype), test_utils=OPCHECKS)


@pytest.mark.parametrize("name", sorted(OPS))
def test_the_op_declares_what_it_takes_and_makes(name: str) -> None:
    op, given_arguments = OPS[name], example_arguments(name, torch.float32)
    results = op(*given_arguments)
    assert len(op.outputs) == (1 if isinstance(results, torch.Tensor) else len(results))
    assert [isinstance(value, torch.Tensor) for value in given_arguments] == [True] * len(op.inputs) + [False] * len(op.attributes)
