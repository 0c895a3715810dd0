"""Logits to the next token: penalties, temperature, top-k, top-p, min-p, in that order (the order of transformers' processors).

For one row of logits x, with peak = max x and T the temperature:

    repetition   x_i = x_i / r  if x_i >= 0  else x_i * r          for every token i of prompt and answer
    presence     x_i = x_i - a - f * count_i                        for every generated token i (f: the frequency penalty)
    top-k        keep x_i >= the k-th largest (ties of the k-th stay)
    weights      w_i = exp((x_i - peak) / T)
    top-p        keep the largest w until their share of the sum reaches p
    min-p        keep w_i >= min_p                                  (peak has w = 1)
    p_i = w_i / sum w

The vocabulary has 248,077 entries, so what is done once per token and entry decides the cost: with top-k one pass over the logits, and
everything else on k candidates. Medians of `pytest tests/test_sampling.py -k cost -s` on one core of an AMD EPYC: greedy 17 us, top-k 20
with top-p 60 us, the same with a presence penalty 110 us, top-p without top-k 0.4 ms, no filter 1.3 ms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwen_export.errors import QwenExportError
from qwen_export.runtimes.logits import Row, Top
from qwen_export.runtimes.token_history import TokenHistory

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose a token. The defaults switch every filter and penalty off.

    `greedy` and a `temperature` of 0 (below 1e-5) both mean: the largest logit after penalties, the lowest id on a tie. `top_k` 0,
    `top_p` 1 and `min_p` 0 are off. `seed` None draws a fresh one. Raises QwenExportError, naming the flag, for a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        _check("--temperature", self.temperature, self.temperature >= 0, "a number >= 0")
        _check("--top-p", self.top_p, 0 < self.top_p <= 1, "a number in (0, 1]")
        _check("--top-k", self.top_k, self.top_k >= 0 and isinstance(self.top_k, int), "an integer >= 0 (0 is off)")
        _check("--min-p", self.min_p, 0 <= self.min_p <= 1, "a number in [0, 1]")
        _check("--presence-penalty", self.presence_penalty, abs(self.presence_penalty) <= 2, "a number in [-2, 2]")
        _check("--frequency-penalty", self.frequency_penalty, abs(self.frequency_penalty) <= 2, "a number in [-2, 2]")
        _check("--repetition-penalty", self.repetition_penalty, self.repetition_penalty > 0, "a number > 0 (1 is off)")
        if self.seed is not None:
            _check("--seed", self.seed, self.seed >= 0 and isinstance(self.seed, int), "an integer >= 0")

    @property
    def is_greedy(self) -> bool:
        """Whether the choice is not random."""
        return self.greedy or self.temperature < 1e-5


def _check(flag: str, value: float, in_range: bool, expected: str) -> None:
    if not in_range or not math.isfinite(value):
        raise QwenExportError(f"The value of {flag} is out of range", got=value, expected=expected)


_CERTAIN = np.ones(1)


class Distribution(NamedTuple):
    """Probabilities of the tokens that can be chosen: `ids` i64[n] ascending, `probs` f64[n] with sum 1. Tokens not in it have 0."""

    ids: NDArray[np.int64]
    probs: NDArray[np.float64]

    def of(self, token_id: int) -> float:
        """The probability of one token."""
        if len(self.ids) == 1:
            return float(self.probs[0]) if self.ids[0] == token_id else 0.0
        at = int(np.searchsorted(self.ids, token_id))
        return float(self.probs[at]) if at < len(self.ids) and self.ids[at] == token_id else 0.0

    def draw(self, number: float) -> int:
        """The token at `number` in [0, 1) of the cumulative sum."""
        if len(self.ids) == 1:
            return int(self.ids[0])
        cumulative = np.cumsum(self.probs)
        at = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
        return int(self.ids[min(at, len(self.ids) - 1)])


class Sampler:
    """Applies `params` to rows of logits. `rng` (PCG64) is the only state: equal seeds and logits give equal tokens. A token costs one
    number of it, whether there is a choice or not, so that number i chooses token i.

    `vocab_limit`: tokens of the tokenizer; the rows of the head behind it are padding and are never chosen.
    """

    def __init__(self, params: SamplingParams, vocab_limit: int | None = None) -> None:
        self.params = params
        self.vocab_limit = vocab_limit
        self.rng = np.random.Generator(np.random.PCG64(params.seed))

    def distribution(self, logits: Logits | Row, history: TokenHistory | None = None) -> Distribution:
        """What `sample` draws from. `logits`: float[V], left unchanged, or a row that has its largest entries: the result is the same.
        Speculative sampling needs it of draft and target alike.

        Raises QwenExportError when the logits hold NaN or +inf, or nothing finite.
        """
        params = self.params
        found = self._from_top(logits.top, history) if isinstance(logits, Row) else None
        ids, kept = found or self._from_all(logits.array if isinstance(logits, Row) else logits, history)
        if params.is_greedy:
            _check_peak(kept[0])
            return Distribution(ids, _CERTAIN)
        peak = kept.max()
        _check_peak(peak)
        weights = np.exp((kept - peak) / kept.dtype.type(params.temperature))
        if params.top_p < 1:
            inside = nucleus(weights, params.top_p)
            ids, weights = ids[inside], weights[inside]
        if params.min_p > 0:
            inside = np.flatnonzero(weights >= params.min_p)
            ids, weights = ids[inside], weights[inside]
        probs = weights.astype(np.float64)
        return Distribution(ids, probs / probs.sum())

    def _from_all(self, logits: Logits, history: TokenHistory | None) -> tuple[NDArray[np.int64], Logits]:
        """Ids, ascending, and penalised logits of the best token or of all that top-k leaves."""
        x = logits[: self.vocab_limit]
        if history is not None and self._penalises:
            x = self._penalised(x.copy(), history)
        if self.params.is_greedy:
            best = np.array([x.argmax()])  # the first NaN, if there is one
            return best, x[best]
        if not self.params.top_k:
            return np.arange(len(x)), x
        ids = top_ids(x, self.params.top_k)
        return ids, x[ids].astype(np.float64)

    def _from_top(self, top: Top | None, history: TokenHistory | None) -> tuple[NDArray[np.int64], Logits] | None:
        """The same from the largest entries alone; None when it takes all. Penalties that only lower leave the others where they are: at
        most at the last entry, `floor`. What is above it after penalties is above all others."""
        params = self.params
        if top is None or not (params.is_greedy or params.top_k):
            return None
        x, ids = top
        if not math.isfinite(x[0]):
            _check_peak(x[0])
        floor = x[-1]
        if self.vocab_limit is not None and (outside := ids >= self.vocab_limit).any():
            x, ids = x[~outside], ids[~outside]
        if history is not None and self._penalises:
            if params.repetition_penalty < 1 or params.presence_penalty < 0 or params.frequency_penalty < 0:
                return None
            x = self._penalised_few(x.copy(), ids, history)
        elif params.is_greedy and len(x):
            return ids[:1].astype(np.int64), x[:1]
        k = 1 if params.is_greedy else params.top_k
        if k > len(x):
            return None
        bound = _kth_largest(x, k)
        if not bound > floor:
            return None
        kept = np.flatnonzero(x >= bound)
        kept = kept[np.argsort(ids[kept])][: 1 if params.is_greedy else None]
        return ids[kept].astype(np.int64), x[kept].astype(np.float64)

    def sample(self, logits: Logits | Row, history: TokenHistory | None = None) -> int:
        """The next token of one row of logits."""
        return self.distribution(logits, history).draw(self.rng.random())

    @property
    def _penalises(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0

    def _penalised(self, x: Logits, history: TokenHistory) -> Logits:
        """Penalties on all logits, in place."""
        params = self.params
        if params.repetition_penalty != 1:
            ids = history.seen()
            ids = ids[ids < len(x)]
            x[ids] = np.where(x[ids] < 0, x[ids] * params.repetition_penalty, x[ids] / params.repetition_penalty)
        if params.presence_penalty != 0 or params.frequency_penalty != 0:
            ids, counts = history.generated()
            ids, counts = ids[ids < len(x)], counts[ids < len(x)]
            x[ids] -= params.presence_penalty + params.frequency_penalty * counts
        return x

    def _penalised_few(self, x: Logits, ids: NDArray[np.int32], history: TokenHistory) -> Logits:
        """Penalties on the logits of some tokens, in place."""
        params, (seen, counts) = self.params, history.of(ids.tolist())
        if params.repetition_penalty != 1:
            x[seen] = np.where(x[seen] < 0, x[seen] * params.repetition_penalty, x[seen] / params.repetition_penalty)
        if params.presence_penalty != 0 or params.frequency_penalty != 0:
            made = counts > 0
            x[made] -= params.presence_penalty + params.frequency_penalty * counts[made]
        return x


def residual(wanted: Distribution, drafted: Distribution) -> Distribution:
    """max(p - q, 0), normalised: what is left of `wanted` when a draft from `drafted` was not kept."""
    at = np.searchsorted(drafted.ids, wanted.ids)
    inside = at < len(drafted.ids)
    same = np.zeros(len(wanted.ids), bool)
    same[inside] = drafted.ids[at[inside]] == wanted.ids[inside]
    probs = wanted.probs.copy()
    probs[same] = np.maximum(probs[same] - drafted.probs[at[same]], 0)
    kept = probs > 0
    if not kept.any():  # rounding: the two are equal, and any token of them will do
        return wanted
    return Distribution(wanted.ids[kept], probs[kept] / probs[kept].sum())


def _check_peak(peak: np.floating[Any]) -> None:
    if not math.isfinite(peak):
        raise QwenExportError(
            "The model's output holds no usable logits",
            got=f"a maximum of {peak}",
            expected="a finite number",
            fix="Run `qwen-export verify` on this bundle; at reduced precision an activation may have overflowed",
        )


def top_ids(x: Logits, k: int) -> NDArray[np.int64]:
    """Positions of all x_i >= the k-th largest value, ascending: k of them, more on ties, all of a shorter x. NaN counts as largest.

    The maxima of columns of 64 entries are found in one pass. The k-th largest of them is a lower bound of the k-th largest entry, so only
    columns that reach it have to be looked at again: about ten times faster than np.argpartition over the vocabulary.
    """
    if k >= len(x):
        return np.arange(len(x))
    columns = len(x) // 64
    if k > columns // 4:
        return np.flatnonzero(~(x < _kth_largest(x, k)))
    maxima = x[: 64 * columns].reshape(64, columns).max(axis=0)
    high = np.flatnonzero(~(maxima < _kth_largest(maxima, k)))
    candidates = np.concatenate([(np.arange(0, 64 * columns, columns)[:, None] + high).ravel(), np.arange(64 * columns, len(x))])
    values = x[candidates]
    return candidates[~(values < _kth_largest(values, k))]


def _kth_largest(x: Logits, k: int) -> np.floating[Any]:
    return np.partition(x, len(x) - k)[len(x) - k]


def nucleus(weights: Logits, top_p: float) -> NDArray[np.int64]:
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
