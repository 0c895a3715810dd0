"""Arguments of the ops gated_delta_net and gated_attention in float64, at random."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qwen_export.graphs.ops.gated_attention_op import gated_attention

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


def delta_net_arguments(
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
    B = len(lengths)
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
