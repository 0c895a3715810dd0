"""Log probabilities as the model gives them: the log-softmax of the whole row, before bias, penalties, temperature and constraints."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwen_export.runtimes.decoding.logit_rows import Row
from qwen_export.runtimes.sampling.largest import top_ids


class ChosenLogprob(NamedTuple):
    """A token with its log probability, and the likeliest tokens of its row, descending; of equal ones the lower id first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def chosen_logprob(logits: NDArray[np.floating[Any]], token: int, count: int, limit: int | None) -> ChosenLogprob:
    """For one row of logits, float[V]; `count` likeliest tokens, of those below `limit`."""
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits - logits.dtype.type(peak)).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        known = logits[:limit]
        ids = top_ids(known, count)
        ids = ids[np.argsort(-known[ids], kind="stable")][:count]
        top = tuple(zip(ids.tolist(), (known[ids].astype(np.float64) - total).tolist(), strict=True))
    return ChosenLogprob(token, float(logits[token]) - total, top)


class LogprobRecorder:
    """Log probabilities of the tokens of one answer, in order. It is ahead of the tokens that were given out, never behind."""

    def __init__(self, count: int, limit: int | None) -> None:
        self._count, self._limit = count, limit
        self.chosen: list[ChosenLogprob] = []

    def add(self, row: NDArray[np.floating[Any]] | Row, token: int) -> None:
        """A token was chosen from a row."""
        logits = row.array if isinstance(row, Row) else row
        self.chosen.append(chosen_logprob(logits, token, self._count, self._limit))
