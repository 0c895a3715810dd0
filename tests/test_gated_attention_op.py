"""The op gated_attention against a loop over queries in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.support.op_inputs import EPS, Array, Attention, close, make_attention, sigmoid, tensor


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
