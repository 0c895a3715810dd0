"""Choosing the next token of many sequences at once, from the largest logits of each row.

The same choices as `Sampler.distribution` and `draw`, in operations over all rows instead of a loop over the entries of each: 32 rows cost
what some four cost one by one. Rows with rules or a constraint, and rows whose largest logits are not enough, are chosen one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np
import numpy.typing as npt

from qwen_export.runtimes.decoding.logit_rows import Floats, Ids, Row
from qwen_export.runtimes.sampling.sampler import Choice, SamplingParams
from qwen_export.runtimes.sampling.token_history import counts_of
from qwen_export.runtimes.serving.served_call import ServedCall

_FEW = 3
"""Rows from which on operations over all of them are faster."""


def choose(rows: Sequence[Row], calls: Sequence[ServedCall]) -> list[int | Exception]:
    """The next token of each call, or what choosing it raised. A token takes one number of the call's generator."""
    chosen: list[int | Exception | None] = [None] * len(rows)
    greedy = [place for place, call in enumerate(calls) if call.choice is Choice.GREEDY]
    many = [place for place, call in enumerate(calls) if call.choice is Choice.FROM_LARGEST]
    if greedy and (largest := _largest([rows[place] for place in greedy])) is not None:
        limits = [calls[place].request.sampler.vocab_limit for place in greedy]
        for place, token, logit, limit in zip(greedy, largest[1][:, 0].tolist(), largest[0][:, 0].tolist(), limits, strict=True):
            if (limit is None or token < limit) and isfinite(logit):
                chosen[place] = token
    if len(many) >= _FEW and (largest := _largest([rows[place] for place in many])) is not None:
        for place, found in zip(many, _sampled(*largest, [calls[place] for place in many]), strict=True):
            chosen[place] = found
    for place, done in enumerate(chosen):
        if done is None:
            chosen[place] = _one(rows[place], calls[place])
    return [token for token in chosen if token is not None]


def _largest(rows: Sequence[Row]) -> tuple[Floats, Ids] | None:
    """The largest logits of rows, f32[n,K], and their ids; None where a graph does not pick them, or not as many as others."""
    first = rows[0].rows
    if all(row.rows is first for row in rows):
        tops = first.tops()
        if tops is None:
            return None
        at = [row.index for row in rows]
        return (tops[0], tops[1]) if at == list(range(len(tops[1]))) else (tops[0][at], tops[1][at])
    parts = [(row.rows.tops(), row.index) for row in rows]
    known = [(tops[0][at], tops[1][at]) for tops, at in parts if tops is not None]
    if len(known) < len(parts) or len({len(ids) for _, ids in known}) > 1:
        return None
    return np.stack([logits for logits, _ in known]), np.stack([ids for _, ids in known])


def _one(row: Row, call: ServedCall) -> int | Exception:
    try:
        distribution = call.request.sampler.distribution(row, call.history)
        token = call.acceptance.token(distribution, None, 0)
        call.request.sampler.chosen(row, token)
    except Exception as error:  # of this row alone; the others go on
        return error
    call.acceptance.advance(1)
    return token


def _sampled(logits: Floats, ids: Ids, calls: Sequence[ServedCall]) -> list[int | None]:
    """Tokens of rows with top-k; None where the largest logits are not enough."""
    samplers = [call.request.sampler for call in calls]
    params = [sampler.params for sampler in samplers]
    x = logits.astype(np.float64)
    floor = x[:, -1].copy()
    k = np.array([p.top_k for p in params])
    usable = np.isfinite(x[:, 0]) & (k < ids.shape[1])
    limits = np.array([sampler.vocab_limit or np.iinfo(np.int32).max for sampler in samplers])
    usable &= (ids < limits[:, None]).all(axis=1)
    if any(sampler.penalizes for sampler in samplers):
        x, ids = _penalized(x, ids, calls, params)
    temperature = np.array([p.temperature for p in params])[:, None]
    bound = x[np.arange(len(k)), np.minimum(k, ids.shape[1]) - 1][:, None]
    usable &= bound[:, 0] > floor
    inside = x >= bound
    width = max(1, int(inside.sum(axis=1).max()))  # behind it no row has an entry
    x, ids, inside = x[:, :width], ids[:, :width], inside[:, :width]
    # Rows that are not usable may hold anything; what comes out of them is not looked at.
    with np.errstate(all="ignore"):
        weights = np.where(inside, np.exp((x - x[:, :1]) / temperature), 0.0)
    tokens = _draw(ids, weights, params, calls, usable)
    return [token if good else None for token, good in zip(tokens.tolist(), usable.tolist(), strict=True)]


def _penalized(
    x: npt.NDArray[np.float64], ids: Ids, calls: Sequence[ServedCall], params: Sequence[SamplingParams]
) -> tuple[npt.NDArray[np.float64], Ids]:
    """Logits [n,K] after penalties, in fp32 as the sampler has them, and their ids: larger first, of equal ones the lower id first."""
    entries = np.stack([call.history.entries(row) for call, row in zip(calls, ids, strict=True)])
    seen, counts = counts_of(entries)
    repetition = np.array([float(np.float32(p.repetition_penalty)) for p in params])[:, None]
    if (repetition != 1).any():
        x = np.where(seen, np.where(x < 0, x * repetition, x / repetition).astype(np.float32), x)
    lowered = np.array([p.presence_penalty for p in params])[:, None] + np.array([p.frequency_penalty for p in params])[:, None] * counts
    x = np.where(counts > 0, (x - lowered).astype(np.float32), x)
    order = np.lexsort((ids, -x), axis=1)
    return np.take_along_axis(x, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _draw(
    ids: Ids,
    weights: npt.NDArray[np.float64],
    params: Sequence[SamplingParams],
    calls: Sequence[ServedCall],
    usable: npt.NDArray[np.bool_],
) -> Ids:
    """`weights` [n,K] are descending, 0 where top-k left nothing; top-p and min-p are applied here."""
    reached = np.cumsum(weights, axis=1)
    wanted = np.array([p.top_p for p in params])[:, None] * reached[:, -1:]
    every = np.array([p.top_p >= 1 for p in params])[:, None]
    # An entry stays if those before it have not reached the share.
    before = np.zeros_like(reached)
    before[:, 1:] = reached[:, :-1]
    kept = every | (before < wanted)
    kept &= (weights >= np.array([p.min_p for p in params])[:, None]) & (weights > 0)
    weights = np.where(kept, weights, 0.0)
    order = np.argsort(ids, axis=1)
    ordered = np.take_along_axis(weights, order, axis=1)
    cumulative = np.cumsum(ordered, axis=1)
    numbers = np.array([call.acceptance.next_number() if good else 0.0 for call, good in zip(calls, usable.tolist(), strict=True)])
    # The first entry whose sum is above the number; entries without a weight never are.
    at = (cumulative <= (numbers * cumulative[:, -1])[:, None]).sum(axis=1)
    last = ids.shape[1] - 1 - (ordered > 0)[:, ::-1].argmax(axis=1)
    at = np.minimum(at, last)
    return np.take_along_axis(np.take_along_axis(ids, order, axis=1), at[:, None], axis=1)[:, 0]
