"""Probabilities of the next token."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Distribution(NamedTuple):
    """Probabilities of the tokens that can be chosen: `ids` ascending, `probs` with sum 1. Tokens not in it have 0.

    Few tokens are lists and many are arrays, i64 and f64: after a call that has read gigabytes of weights nothing is in the cache, and one
    operation of numpy costs more than a loop over twenty numbers."""

    ids: Sequence[int] | NDArray[np.int64]
    probs: Sequence[float] | NDArray[np.float64]

    @classmethod
    def certain(cls, token: int) -> Distribution:
        return cls([token], [1.0])

    def of(self, token: int) -> float:
        """The probability of one token."""
        at = bisect_left(self.ids, token)
        return float(self.probs[at]) if at < len(self.ids) and self.ids[at] == token else 0.0

    def draw(self, number: float) -> int:
        """The token at `number` in [0, 1) of the cumulative sum."""
        if len(self.ids) == 1:
            return int(self.ids[0])
        cumulative = np.cumsum(self.probs) if isinstance(self.probs, np.ndarray) else list(accumulate(self.probs))
        at = bisect_right(cumulative, number * float(cumulative[-1]))
        return int(self.ids[min(at, len(self.ids) - 1)])


def residual(wanted: Distribution, drafted: Distribution) -> Distribution:
    """max(p - q, 0), normalized: what is left of `wanted` when a draft from `drafted` was not kept."""
    if not isinstance(wanted.ids, np.ndarray):
        left = [(token, p - drafted.of(token)) for token, p in zip(wanted.ids, wanted.probs, strict=True)]
        left = [(token, p) for token, p in left if p > 0]
        total = sum(p for _, p in left)
        return Distribution([token for token, _ in left], [p / total for _, p in left]) if left else wanted
    probs = np.array(wanted.probs)
    drafted_ids = np.asarray(drafted.ids)
    at = np.searchsorted(drafted_ids, wanted.ids)
    inside = at < len(drafted_ids)
    same = np.zeros(len(probs), bool)
    same[inside] = drafted_ids[at[inside]] == wanted.ids[inside]
    probs[same] = np.maximum(probs[same] - np.asarray(drafted.probs)[at[same]], 0)
    kept = probs > 0
    if not kept.any():  # rounding: the two are equal, and any token of them will do
        return wanted
    return Distribution(wanted.ids[kept], probs[kept] / probs[kept].sum())
