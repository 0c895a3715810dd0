"""The ops against references of their own: plain loops in float64, written from the equations."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_export.graphs.ops.gated_attention_op import gated_attention
from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.ops.op_table import OPS
from qwen_export.graphs.ops.rms_norm_op import rms_norm

Array = npt.NDArray[np.float64]
EPS = 1e-6
DK, DV = 5, 3
OPCHECKS = ("test_schema", "test_faketensor")


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def noise(seed: int, *shape: int) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def tensor(x: Array, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype)


# ---- gated_delta_net


@dataclasses.dataclass
class Mixer:
    """Weights of one Gated DeltaNet mixer, float64."""

    key_heads: int
    value_heads: int
    conv_weight: Array
    a_log: Array
    dt_bias: Array
    norm: Array

    @property
    def channels(self) -> int:
        return self.conv_weight.shape[0]

    @property
    def taps(self) -> int:
        return self.conv_weight.shape[1]


@dataclasses.dataclass
class Tokens:
    """Inputs of some tokens [B,T,...]."""

    qkv: Array
    z: Array
    b: Array
    a: Array

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.qkv[:, rows], self.z[:, rows], self.b[:, rows], self.a[:, rows])


def make_mixer(ratio: int, key_heads: int = 2, taps: int = 4) -> Mixer:
    value_heads = ratio * key_heads
    channels = 2 * key_heads * DK + value_heads * DV
    decay = np.log(np.random.default_rng(1).uniform(0.5, 4, value_heads))
    return Mixer(key_heads, value_heads, noise(2, channels, taps), decay, noise(3, value_heads) - 2, 1 + 0.2 * noise(4, DV))


def make_tokens(mixer: Mixer, B: int, T: int, seed: int = 10) -> Tokens:
    Hv = mixer.value_heads
    shapes = ((B, T, mixer.channels), (B, T, Hv * DV), (B, T, Hv), (B, T, Hv))
    return Tokens(*(noise(seed + i, *shape) for i, shape in enumerate(shapes)))


def make_state(mixer: Mixer, B: int, seed: int = 20) -> tuple[Array, Array]:
    return noise(seed, B, mixer.taps - 1, mixer.channels), 0.5 * noise(seed + 1, B, mixer.value_heads, DK, DV)


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
    return gated_delta_net(*arguments(mixer, x, history, state, pending, accepted, commit, dtype))


def arguments(
    mixer: Mixer,
    x: Tokens,
    history: Any,
    state: Any,
    pending: Tokens | None = None,
    accepted: Any = None,
    commit: Any = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, ...]:
    """The op's arguments; without pending tokens and counts, all new tokens are committed."""
    B, T = x.qkv.shape[:2]
    pending = x[:0] if pending is None else pending
    wide = torch.promote_types(dtype, torch.float32)

    def as_tensor(value: Any, of: torch.dtype) -> torch.Tensor:
        return value.to(of) if isinstance(value, torch.Tensor) else tensor(value, of)

    return (
        *(tensor(v, dtype) for v in (x.qkv, x.z, x.b, x.a, mixer.conv_weight)),
        tensor(mixer.a_log, wide),
        tensor(mixer.dt_bias, wide),
        tensor(mixer.norm, dtype),
        as_tensor(history, dtype),
        as_tensor(state, wide),
        *(tensor(v, dtype) for v in (pending.qkv, pending.b, pending.a)),
        torch.tensor([0] * B if accepted is None else accepted),
        torch.tensor([T] * B if commit is None else commit),
        mixer.key_heads,
        EPS,
    )


def close(got: torch.Tensor, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(got.double().numpy(), np.asarray(expected), rtol=tolerance, atol=tolerance)


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


# ---- gated_attention


@dataclasses.dataclass
class Attention:
    """Arguments of one call of gated_attention, float64."""

    q_gate: Array
    k: Array
    v: Array
    q_norm: Array
    k_norm: Array
    angles: Array
    k_cache: Array
    v_cache: Array
    length: list[int]
    heads: int
    kv_heads: int

    def run(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return gated_attention(*self.arguments(dtype))

    def arguments(self, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        projections = (self.q_gate, self.k, self.v, self.q_norm, self.k_norm)
        tables = (np.cos(self.angles), np.sin(self.angles))
        wide = torch.promote_types(dtype, torch.float32)
        return (
            *(tensor(x, dtype) for x in projections),
            *(tensor(x, wide) for x in tables),
            tensor(self.k_cache, dtype),
            tensor(self.v_cache, dtype),
            torch.tensor(self.length),
            self.heads,
            self.kv_heads,
            EPS,
        )


def make_attention(
    ratio: int, *, kv_heads: int = 2, lengths: tuple[int, ...] = (0, 5), T: int = 3, S: int = 11, D: int = 8, R: int = 4
) -> Attention:
    """Cached keys and values up to each sequence's length; the slots behind are NaN. Angles of slot s are its position's, as for text."""
    B, S, kv_heads = len(lengths), 11, 2
    heads = ratio * kv_heads
    k_cache, v_cache = noise(60, B, kv_heads, S, D), noise(61, B, kv_heads, S, D)
    for i, length in enumerate(lengths):
        k_cache[i, :, length:] = v_cache[i, :, length:] = np.nan
    angles = np.arange(S)[:, None] * 100.0 ** -(np.arange(R // 2) / (R // 2))
    return Attention(
        noise(62, B, T, heads * 2 * D),
        noise(63, B, T, kv_heads * D),
        noise(64, B, T, kv_heads * D),
        0.3 * noise(65, D),
        0.3 * noise(66, D),
        angles,
        k_cache,
        v_cache,
        list(lengths),
        heads,
        kv_heads,
    )


def normed_and_turned(x: Array, weight: Array, angles: Array) -> Array:
    """One head's vector [D]: zero-centered RMS norm; pairs (j, j + R/2) turn as complex numbers."""
    x = x / np.sqrt(np.mean(x**2) + EPS) * (1 + weight)
    half = len(angles)
    turned = (x[:half] + 1j * x[half : 2 * half]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag, x[2 * half :]])


def attention_reference(call: Attention) -> tuple[Array, Array, Array]:
    """One query at a time over the slots it may see."""
    (B, Hkv, _, D), T = call.k_cache.shape, call.k.shape[1]
    y, k_cache, v_cache = np.zeros((B, T, call.heads, D)), call.k_cache.copy(), call.v_cache.copy()
    for i in range(B):
        for t in range(T):
            slot = call.length[i] + t
            for j in range(Hkv):
                k_cache[i, j, slot] = normed_and_turned(call.k[i, t].reshape(Hkv, D)[j], call.k_norm, call.angles[slot])
                v_cache[i, j, slot] = call.v[i, t].reshape(Hkv, D)[j]
            for h in range(call.heads):
                both = call.q_gate[i, t].reshape(call.heads, 2 * D)[h]
                query, gate = normed_and_turned(both[:D], call.q_norm, call.angles[slot]), both[D:]
                j = h * Hkv // call.heads
                score = np.array([query @ k_cache[i, j, s] / np.sqrt(D) for s in range(slot + 1)])
                weight = np.exp(score - score.max())
                weight /= weight.sum()
                y[i, t, h] = sum(w * v_cache[i, j, s] for s, w in enumerate(weight)) * sigmoid(gate)
    return y.reshape(B, T, -1), k_cache, v_cache


@pytest.mark.parametrize("ratio", [4, 6, 8, 16])
@pytest.mark.parametrize(("D", "R"), [(8, 4), (16, 4), (8, 8)], ids=["half", "quarter", "all"])
def test_attention_equals_the_reference(ratio: int, D: int, R: int) -> None:
    """Sequences of their own lengths; slots behind them are NaN and stay unread and unwritten."""
    call = make_attention(ratio, lengths=(0, 5, 8), D=D, R=R)
    y, k_cache, v_cache = call.run()
    expected, expected_k, expected_v = attention_reference(call)
    close(y, expected, 1e-12)
    close(k_cache, expected_k, 1e-13)
    close(v_cache, expected_v, 0)


def test_the_cache_is_written_in_the_new_slots_only() -> None:
    call = make_attention(4, lengths=(2, 6), T=3)
    before = tensor(call.k_cache), tensor(call.v_cache)
    _, *after = call.run()
    for old, new in zip(before, after, strict=True):
        for i, length in enumerate(call.length):
            assert torch.equal(new[i, :, :length], old[i, :, :length])
            assert new[i, :, length : length + 3].isfinite().all()
            assert new[i, :, length + 3 :].isnan().all()


def test_rolling_back_is_a_smaller_length() -> None:
    """Draft tokens were written and rejected; what follows is as if they had never been."""
    call = make_attention(4, lengths=(5, 2))
    clean = call.run()
    draft = make_attention(4, lengths=(5, 2), T=6)
    draft.k, draft.v = draft.k + 10, draft.v + 10
    _, k_cache, v_cache = draft.run()
    again = dataclasses.replace(call, k_cache=k_cache.numpy(), v_cache=v_cache.numpy())
    y, k_again, _ = again.run()
    assert torch.equal(y, clean[0])
    for i, length in enumerate(call.length):
        assert torch.equal(k_again[i, :, : length + 3], clean[1][i, :, : length + 3])


def test_attention_may_be_split_anywhere() -> None:
    call = make_attention(6, lengths=(0, 4), T=6)
    whole = call.run()
    for cut in range(1, 6):
        first = dataclasses.replace(call, q_gate=call.q_gate[:, :cut], k=call.k[:, :cut], v=call.v[:, :cut])
        y, k_cache, v_cache = first.run()
        second = dataclasses.replace(
            call,
            q_gate=call.q_gate[:, cut:],
            k=call.k[:, cut:],
            v=call.v[:, cut:],
            k_cache=k_cache.numpy(),
            v_cache=v_cache.numpy(),
            length=[n + cut for n in call.length],
        )
        y_second, k_cache, v_cache = second.run()
        close(torch.cat([y, y_second], 1), whole[0], 1e-12)
        assert torch.equal(k_cache.nan_to_num(), whole[1].nan_to_num())


def test_the_gate_closes_each_head_dimension_on_its_own() -> None:
    call = make_attention(4, lengths=(3,), T=1)
    D = call.k_cache.shape[3]
    packed = call.q_gate.reshape(1, 1, call.heads, 2 * D)
    packed[..., D:] = 60
    opened = call.run()[0]
    packed[0, 0, 2, D + 3] = -60
    closed = call.run()[0]
    at = 2 * D + 3
    assert abs(closed[0, 0, at]) < 1e-20 < abs(opened[0, 0, at])
    assert torch.equal(torch.cat([closed[..., :at], closed[..., at + 1 :]], -1), torch.cat([opened[..., :at], opened[..., at + 1 :]], -1))


def test_attention_refuses_what_the_cache_cannot_hold() -> None:
    with pytest.raises(ValueError, match="9 cached and 3 new tokens do not fit a cache of 11"):
        make_attention(4, lengths=(0, 9), T=3).run()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 8e-3), (torch.bfloat16, 6e-2)])
def test_attention_keeps_the_dtype(dtype: torch.dtype, tolerance: float) -> None:
    call = make_attention(8, lengths=(0, 5))
    y, k_cache, v_cache = call.run(dtype)
    assert y.dtype == k_cache.dtype == v_cache.dtype == dtype
    assert np.abs(y.double().numpy() - attention_reference(call)[0]).max() < tolerance


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
    mixer = make_mixer(2)
    return arguments(mixer, make_tokens(mixer, 2, 3), *make_state(mixer, 2), make_tokens(mixer, 2, 2), [0, 2], [0, 3], dtype)


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
