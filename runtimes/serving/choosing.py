"""Choosing the next token of many sequences at once, from the largest logits of each row.

The same choices as `Sampler.distribution` and `draw`, in operations over all rows instead of a loop over the entries of each: 32 rows cost
what some four cost one by one. Rows with rules or a constraint, and rows whose largest logits are not enough, are chosen one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qwen_export.runtimes.decoding.logit_rows import Row
from qwen_export.runtimes.sampling.sampler import SamplingParams
from qwen_export.runtimes.serving.served_call import ServedCall

_FEW = 3
"""Rows from which on operations over all of them are faster."""


def choose(rows: Sequence[Row], calls: Sequence[ServedCall]) -> list[int | Exception]:
    """The next token of each call, or what choosing it raised. A token takes one number of the call's generator."""
    chosen: list[int | Exception | None] = [None] * len(rows)
    many: list[int] = []
    for place, (row, call) in enumerate(zip(rows, calls, strict=True)):
        sampler = call.request.sampler
        if not sampler.plain:
            continue
        params, top, limit = sampler.params, row.top, sampler.vocab_limit
        if top is None:
            continue
        if params.is_greedy:
            if sampler.penalizes:
                continue
            token = top.ids[0]
            if (limit is None or token < limit) and abs(top.logits[0]) < float("inf"):
                chosen[place] = token
        elif 0 < params.top_k < len(top.ids) and (not sampler.penalizes or _lowers(params)):
            many.append(place)
    if len(many) >= _FEW:
        for place, found in zip(many, _sampled([rows[place] for place in many], [calls[place] for place in many]), strict=True):
            chosen[place] = found
    for place, done in enumerate(chosen):
        if done is None:
            chosen[place] = _one(rows[place], calls[place])
    return [token for token in chosen if token is not None]


def _one(row: Row, call: ServedCall) -> int | Exception:
    try:
        distribution = call.request.sampler.distribution(row, call.history)
        token = call.acceptance.token(distribution, None, 0)
        call.request.sampler.chosen(row, token)
    except Exception as error:  # of this row alone; the others go on
        return error
    call.acceptance.advance(1)
    return token


def _lowers(params: SamplingParams) -> bool:
    """Whether penalties lower logits only: what is not among the largest stays below them."""
    return params.repetition_penalty >= 1 and params.presence_penalty >= 0 and params.frequency_penalty >= 0


def _sampled(rows: Sequence[Row], calls: Sequence[ServedCall]) -> list[int | None]:
    """Tokens of plain rows with top-k; None where the largest logits are not enough."""
    tops = [top for row in rows if (top := row.top) is not None]
    x = np.array([top.logits for top in tops], np.float32).astype(np.float64)
    ids = np.array([top.ids for top in tops], np.int32)
    floor = x[:, -1].copy()
    params = [call.request.sampler.params for call in calls]
    usable = np.isfinite(x[:, 0])
    limits = np.array([call.request.sampler.vocab_limit or np.iinfo(np.int32).max for call in calls])
    usable &= (ids < limits[:, None]).all(axis=1)
    if any(call.request.sampler.penalizes for call in calls):
        x, ids = _penalized(x, ids, calls)
    k = np.array([p.top_k for p in params])
    temperature = np.array([p.temperature for p in params])[:, None]
    bound = x[np.arange(len(k)), k - 1][:, None]
    usable &= bound[:, 0] > floor
    # Rows that are not usable may hold anything; what comes out of them is not looked at.
    with np.errstate(all="ignore"):
        weights = np.where(x >= bound, np.exp((x - x[:, :1]) / temperature), 0.0)
    tokens = _draw(ids, weights, params, calls, usable)
    return [int(token) if good else None for token, good in zip(tokens, usable, strict=True)]


def _penalized(
    x: npt.NDArray[np.float64], ids: npt.NDArray[np.int32], calls: Sequence[ServedCall]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Logits [n,K] after penalties, in fp32 as the sampler has them, and their ids: larger first, of equal ones the lower id first."""
    for place, call in enumerate(calls):
        if not call.request.sampler.penalizes:
            continue
        params, (seen, counts) = call.request.sampler.params, call.history.of_each(ids[place])
        row = x[place]
        if params.repetition_penalty != 1:
            factor = float(np.float32(params.repetition_penalty))
            row = np.where(seen, np.where(row < 0, row * factor, row / factor).astype(np.float32), row)
        lowered = (row - (params.presence_penalty + params.frequency_penalty * counts)).astype(np.float32)
        x[place] = np.where(counts > 0, lowered, row)
    order = np.lexsort((ids, -x), axis=1)
    return np.take_along_axis(x, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _draw(
    ids: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float64],
    params: Sequence[SamplingParams],
    calls: Sequence[ServedCall],
    usable: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int32]:
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
    numbers = np.array([call.acceptance.number(0) if good else 0.0 for call, good in zip(calls, usable, strict=True)])
    for call, good in zip(calls, usable, strict=True):
        if good:
            call.acceptance.advance(1)
    # The first entry whose sum is above the number; entries without a weight never are.
    at = (cumulative <= (numbers * cumulative[:, -1])[:, None]).sum(axis=1)
    last = ids.shape[1] - 1 - (ordered > 0)[:, ::-1].argmax(axis=1)
    at = np.minimum(at, last)
    return np.take_along_axis(np.take_along_axis(ids, order, axis=1), at[:, None], axis=1)[:, 0]
