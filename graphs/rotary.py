"""Rotary frequencies, with YaRN. Computed once per build; the runtime makes its tables from them.

inv_freq_i = theta^(-2i/R), i < R/2. YaRN (arXiv 2309.00071, section 3) divides the frequencies that turn less than `beta_slow` times
within the original context by `factor`, leaves those above `beta_fast` alone, blends linearly in between, and scales cos and sin.
"""

from __future__ import annotations

import math

import numpy as np

from qwen_export.graphs.config import TextConfig


def rotary_axes(config: TextConfig) -> tuple[int, ...]:
    """Which position of a token turns each of the R/2 frequencies: 0 time, 1 height, 2 width. They alternate, and time has what the
    sections leave over. (Qwen3.5 reference: apply_interleaved_mrope.)"""
    section = config.rope.mrope_section
    return tuple(axis if (axis := i % 3) and i < 3 * section[axis] else 0 for i in range(config.rotary_dim // 2))


def rotary_frequencies(config: TextConfig) -> tuple[list[float], float]:
    """The R/2 frequencies (fp32 values) in radians per position, and the factor on cos and sin."""
    rope, R = config.rope, config.rotary_dim
    # Rounded to fp32 where the reference rounds: at 262144 positions the last bit of a frequency is visible.
    exponent = np.arange(0, R, 2, dtype=np.int64).astype(np.float32) / np.float32(R)
    powers = np.power(rope.theta, exponent.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    if rope.kind == "default":
        return [float(f) for f in plain], 1.0

    def turning(turns: float) -> float:
        """Index of the frequency that turns this often within the original context."""
        return R * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = turning(rope.beta_fast), turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    high = high + 0.001 if low == high else high
    kept = 1 - np.clip((np.arange(R // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    stretched = np.float32(1) / (np.float32(rope.factor) * powers)
    blended = stretched * (1 - kept) + plain * kept
    return [float(f) for f in blended.astype(np.float32)], rope.attention_factor
