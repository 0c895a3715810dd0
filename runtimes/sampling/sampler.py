"""Logits to the next token: forbidden tokens, penalties, temperature, top-k, top-p, min-p (as transformers' processors do).

For one row of logits x, with peak = max x and T the temperature:

    rules        x_i = -inf                                         for every forbidden token i (`token_rules.py`)
    bias         x_i = x_i + b_i                                    for every token i with a bias
    repetition   x_i = x_i / r  if x_i >= 0  else x_i * r          for every token i of prompt and answer
    presence     x_i = x_i - a - f * count_i                        for every generated token i (f: the frequency penalty)
    top-k        keep x_i >= the k-th largest (ties of the k-th stay)
    weights      w_i = exp((x_i - peak) / T)
    top-p        keep the largest w until their share of the sum reaches p
    min-p        keep w_i >= min_p                                  (peak has w = 1)
    p_i = w_i / sum w

The vocabulary has 248,077 entries, so what is done once per token and entry decides the cost: with top-k one pass over the logits, and
everything else on k candidates. Medians of `benchmarks/sampling_cost.py` on one core of an AMD EPYC: greedy 17 us, top-k 20 with top-p
60 us, the same with a presence penalty 110 us, top-p without top-k 0.4 ms, no filter 1.3 ms.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_export.errors import ParameterError, QwenExportError
from qwen_export.runtimes.decoding.logit_rows import Row, Top
from qwen_export.runtimes.sampling.constraint import Constraint, ForeseeingConstraint
from qwen_export.runtimes.sampling.distribution import Distribution
from qwen_export.runtimes.sampling.largest import nucleus, top_ids
from qwen_export.runtimes.sampling.logprobs import LogprobRecorder
from qwen_export.runtimes.sampling.penalties import Penalties
from qwen_export.runtimes.sampling.token_history import TokenHistory
from qwen_export.runtimes.sampling.token_rules import NOTHING, Forbidden, TokenRules
from qwen_export.runtimes.sampling.token_set import TokenSet

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose a token. The defaults switch every filter, penalty and rule off.

    `greedy` and a `temperature` of 0 (below 1e-5) both mean: the largest logit after penalties, the lowest id on a tie. `top_k` 0,
    `top_p` 1 and `min_p` 0 are off. `seed` None draws a fresh one. The last five are the rules of `TokenRules`. Raises ParameterError for
    a value out of range.
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
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, lambda x: x >= 0, "a number >= 0")
        _check("top_p", self.top_p, lambda x: 0 < x <= 1, "a number in (0, 1]")
        _check_count("top_k", self.top_k)
        _check("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        _check("presence_penalty", self.presence_penalty, lambda x: abs(x) <= 2, "a number in [-2, 2]")
        _check("frequency_penalty", self.frequency_penalty, lambda x: abs(x) <= 2, "a number in [-2, 2]")
        _check("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "a number > 0 (1 is off)")
        if self.seed is not None:
            _check_count("seed", self.seed, "an integer >= 0")
        _check_count("no_repeat_ngram_size", self.no_repeat_ngram_size)
        _check_count("min_new_tokens", self.min_new_tokens)
        _check_ids("suppress_tokens", self.suppress_tokens)
        _check_ids("begin_suppress_tokens", self.begin_suppress_tokens)
        for word in _sequence("bad_words_ids", self.bad_words_ids):
            _check_ids("bad_words_ids", word, "sequences of one or more token ids", least=1)

    @property
    def is_greedy(self) -> bool:
        """Whether the choice is not random."""
        return self.greedy or self.temperature < 1e-5

    def rules(self, stop_ids: Collection[int] = ()) -> TokenRules:
        """Its rules, for an answer that ends at `stop_ids`."""
        return TokenRules(
            self.suppress_tokens,
            self.begin_suppress_tokens,
            tuple(tuple(word) for word in self.bad_words_ids),
            self.no_repeat_ngram_size,
            self.min_new_tokens,
            stop_ids,
        )


def _check(name: str, value: Any, in_range: Callable[[float], bool], expected: str) -> None:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not in_range(value):
        raise ParameterError(
            f"the value of {{{name}}} is out of range", parameter=name, got=repr(value), expected=expected, fix=f"Give {expected}."
        )


def _check_count(name: str, value: Any, expected: str = "an integer >= 0 (0 is off)") -> None:
    _check(name, value, lambda x: x >= 0 and isinstance(x, (int, np.integer)), expected)


def _check_ids(name: str, value: Any, expected: str = "a sequence of token ids", least: int = 0) -> None:
    ids = _sequence(name, value, expected)
    if len(ids) < least or not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ParameterError(
            f"the value of {{{name}}} is not usable", parameter=name, got=repr(value), expected=expected, fix=f"Give {expected}."
        )


def _sequence(name: str, value: Any, expected: str = "a sequence") -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ParameterError(
            f"the value of {{{name}}} is not usable", parameter=name, got=repr(value), expected=expected, fix=f"Give {expected}."
        )
    return value


# Tokens that are looked at one by one, without numpy.
_FEW = 256


class Choice(Enum):
    """How the tokens of an answer are chosen: the largest logit; top-k, which the largest logits mostly have; row by row, since the
    choice depends on more than logits and penalties, or is recorded."""

    GREEDY = "greedy"
    FROM_LARGEST = "from the largest"
    ALONE = "alone"


class Sampler:
    """Applies `params` to rows of logits. `rng` (PCG64) is the only state: equal seeds and logits give equal tokens. A token costs one
    number of it, whether there is a choice or not, so that number i chooses token i.

    `vocab_limit`: tokens of the tokenizer; the rows of the head behind it are padding and are never chosen. `stop_ids`: tokens that end
    the answer, for the rules about them. `constraint`: what the answer must obey; it needs a `history` in every call. `bias`: added to the
    logits of these tokens. `recorder` gets every token that is chosen, with its row.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_limit: int | None = None,
        stop_ids: Collection[int] = (),
        constraint: Constraint | None = None,
        bias: Mapping[int, float] | None = None,
        recorder: LogprobRecorder | None = None,
    ) -> None:
        self.params, self.constraint, self.recorder = params, constraint, recorder
        self._foreseeing = constraint if isinstance(constraint, ForeseeingConstraint) else None
        self._penalties = Penalties(params, bias or {})
        self._rules = params.rules(stop_ids)
        self.vocab_limit = vocab_limit
        self.rng = np.random.Generator(np.random.PCG64(params.seed))

    @property
    def choice(self) -> Choice:
        """How tokens are chosen, as far as the parameters tell."""
        params = self.params
        if self.constraint is not None or self._rules or self._penalties.biased or self.recorder is not None:
            return Choice.ALONE
        if params.is_greedy:
            return Choice.ALONE if self.penalizes else Choice.GREEDY
        lowers = params.repetition_penalty >= 1 and params.presence_penalty >= 0 and params.frequency_penalty >= 0
        return Choice.FROM_LARGEST if params.top_k and (lowers or not self.penalizes) else Choice.ALONE

    @property
    def penalizes(self) -> bool:
        """Whether tokens that occurred count less, or more."""
        return self._penalties.penalizes

    def distribution(self, logits: Logits | Row, history: TokenHistory | None = None) -> Distribution:
        """What `sample` draws from. `logits`: float[V], left unchanged, or a row that has its largest entries: the result is the same.
        Speculative sampling needs it of draft and target alike.

        Raises QwenExportError when the logits hold NaN or +inf, or nothing finite, and NothingAllowedError when the constraint allows none
        of these tokens.
        """
        forbidden = self._rules.forbidden(history) if self._rules else NOTHING
        allowed = self._allowed(history)
        few = allowed.few(_FEW) if allowed is not None else None
        if few is not None:
            return self._among_few(few, logits, history, forbidden)
        if isinstance(logits, Row):
            found = self._among_largest(logits.top, history, forbidden, allowed)
            if found is not None:
                return found
            logits = logits.array
        return self._among_all(logits, history, forbidden, allowed)

    def sample(self, logits: Logits | Row, history: TokenHistory | None = None) -> int:
        """The next token of one row of logits."""
        token = self.distribution(logits, history).draw(self.rng.random())
        self.chosen(logits, token)
        return token

    def chosen(self, logits: Logits | Row, token: int) -> None:
        """A token was chosen from a row, from its `distribution` or because a draft of it was kept."""
        if self.recorder is not None:
            self.recorder.add(logits, token)

    def forced(self, history: TokenHistory) -> Sequence[int]:
        """Tokens that the constraint leaves no choice about: drafts without a drafter."""
        return self._foreseeing.forced(history.answer()) if self._foreseeing is not None else ()

    def fitting(self, history: TokenHistory, drafts: Sequence[int]) -> int:
        """How many of these, from the first on, the constraint allows."""
        return self._foreseeing.fitting(history.answer(), drafts) if self._foreseeing is not None else len(drafts)

    def ahead(self, history: TokenHistory, drafts: Sequence[int] = ()) -> None:
        """Rows behind this text, and behind each of `drafts`, will be chosen from: the constraint may work while the device does."""
        if self._foreseeing is not None:
            self._foreseeing.ahead(history.answer(), drafts)

    def _allowed(self, history: TokenHistory | None) -> TokenSet | None:
        if self.constraint is None or history is None:
            return None
        found = self.constraint.allowed(history.answer())
        return TokenSet.of(found) if isinstance(found, np.ndarray) else found

    def _among_few(
        self, allowed: NDArray[np.int64], logits: Logits | Row, history: TokenHistory | None, forbidden: Forbidden
    ) -> Distribution:
        """From the few tokens that a constraint allows; the logits are not looked at where it allows one."""
        limit = self.vocab_limit
        ids = [token for token in allowed.tolist() if token not in forbidden and (limit is None or token < limit)]
        if len(ids) == 1 and isinstance(logits, Row):
            return Distribution.certain(ids[0])
        x = logits.array if isinstance(logits, Row) else logits
        ids = [token for token in ids if token < len(x)]
        if not ids:
            raise _nothing_allowed(len(allowed))
        values = x[ids]
        _check_peak(values.max())
        change = self._penalties.changed_one
        found = [(token, change(token, value, history)) for token, value in zip(ids, values.tolist(), strict=True)]
        return self._of_pairs(found, None)

    def _among_largest(
        self, top: Top | None, history: TokenHistory | None, forbidden: Forbidden, allowed: TokenSet | None
    ) -> Distribution | None:
        """From the largest entries alone; None when all are needed. Rules, constraints, and bias and penalties that only lower, leave the
        others at most at the last entry, `floor`. What is above it after penalties is above all others."""
        params, penalties = self.params, self._penalties
        if top is None or penalties.may_raise or not (params.is_greedy or params.top_k):
            return None
        _check_peak(top.logits[0])
        floor, limit = top.logits[-1], self.vocab_limit
        changes = penalties.biased or (penalties.penalizes and history is not None)
        if params.is_greedy and not changes and not forbidden and allowed is None and (limit is None or top.ids[0] < limit):
            return Distribution.certain(top.ids[0])
        if not (changes or forbidden or allowed is not None or params.is_greedy):
            plain = self._among_first(top)
            if plain is not None:
                return plain
        largest: list[tuple[int, float]] = list(zip(top.ids.tolist(), top.logits.tolist(), strict=True))
        found = [pair for pair in largest if limit is None or pair[0] < limit]
        if forbidden:
            found = [pair for pair in found if pair[0] not in forbidden]
        if allowed is not None:
            found = [pair for pair in found if pair[0] in allowed]
        if changes:
            found = [(token, penalties.changed_one(token, x, history)) for token, x in found]
        k = 1 if params.is_greedy else params.top_k
        if k > len(found):
            return None
        bound = sorted((x for _, x in found), reverse=True)[k - 1]
        return self._of_pairs(found, bound) if bound > floor else None

    def _among_first(self, top: Top) -> Distribution | None:
        """From the first `top_k` entries and those as large as the last of them, where nothing changes the order: the others are not looked
        at, while a GPU waits for the token. None where these are not enough, or not all may be chosen."""
        k, count = self.params.top_k, len(top.logits)
        if k >= count or not top.logits[k - 1] > top.logits[count - 1]:
            return None
        end = k
        while top.logits[end] == top.logits[k - 1]:
            end += 1
        ids = top.ids[:end].tolist()
        if self.vocab_limit is not None and max(ids) >= self.vocab_limit:
            return None
        return self._few(sorted(zip(ids, top.logits[:end].tolist(), strict=True)))

    def _of_pairs(self, found: list[tuple[int, float]], bound: float | None) -> Distribution:
        """From ids and their logits. `bound`: the k-th largest, if it is known."""
        params = self.params
        k = 1 if params.is_greedy else params.top_k or len(found)
        if bound is None:
            bound = sorted((x for _, x in found), reverse=True)[min(k, len(found)) - 1]
        found = sorted(pair for pair in found if pair[1] >= bound)
        return Distribution.certain(found[0][0]) if params.is_greedy else self._few(found)

    def _few(self, found: list[tuple[int, float]]) -> Distribution:
        """Temperature, top-p and min-p over what top-k left: ids, ascending, and logits."""
        params = self.params
        peak = max(x for _, x in found)
        weights = [math.exp((x - peak) / params.temperature) for _, x in found]
        kept = list(range(len(found)))
        if params.top_p < 1:
            descending = sorted(kept, key=lambda i: -weights[i])
            reached = list(accumulate(weights[i] for i in descending))
            kept = sorted(descending[: bisect_left(reached, params.top_p * sum(weights)) + 1])
        kept = [i for i in kept if weights[i] >= params.min_p]
        total = sum(weights[i] for i in kept)
        return Distribution([found[i][0] for i in kept], [weights[i] / total for i in kept])

    def _among_all(self, logits: Logits, history: TokenHistory | None, forbidden: Forbidden, allowed: TokenSet | None) -> Distribution:
        params = self.params
        x = self._penalties.changed(logits[: self.vocab_limit], history)
        if forbidden:
            x = self._without(x if x.base is None else x.copy(), forbidden)
        if allowed is not None:
            x = self._only(x, allowed)
        if params.is_greedy:
            best = int(x.argmax())  # the first NaN, if there is one
            _check_peak(x[best])
            return Distribution.certain(best)
        ids = top_ids(x, params.top_k) if params.top_k else np.arange(len(x))
        peak = x[ids].max()
        _check_peak(peak)
        if len(ids) <= _FEW:
            return self._few(list(zip(ids.tolist(), x[ids].tolist(), strict=True)))
        weights = np.exp((x[ids] - peak) / x.dtype.type(params.temperature))
        if params.top_p < 1:
            inside = nucleus(weights, params.top_p)
            ids, weights = ids[inside], weights[inside]
        if params.min_p > 0:
            inside = np.flatnonzero(weights >= params.min_p)
            ids, weights = ids[inside], weights[inside]
        probs = weights.astype(np.float64)
        return Distribution(ids, probs / probs.sum())

    @staticmethod
    def _without(x: Logits, forbidden: Forbidden) -> Logits:
        """Minus infinity for the forbidden tokens, in place. NaN stays, and is an error."""
        for ids in forbidden:
            at = np.fromiter((i for i in ids if i < len(x)), np.int64)
            x[at] = np.where(np.isnan(x[at]), x[at], -np.inf)
        if len(x) and x.max() == -np.inf:
            raise QwenExportError(
                "every token is forbidden by the rules of the sampling parameters",
                got=f"{sum(map(len, forbidden))} forbidden tokens",
                fix="Take tokens out of {suppress_tokens} and {bad_words_ids}, or lower {no_repeat_ngram_size}.",
            )
        return x

    @staticmethod
    def _only(x: Logits, allowed: TokenSet) -> Logits:
        """Minus infinity for what the constraint does not allow. NaN stays, and is an error."""
        inside = allowed.array(len(x))
        x = np.where(inside | np.isnan(x), x, x.dtype.type(-np.inf))
        if len(x) and x.max() == -np.inf:
            raise _nothing_allowed(int(inside.sum()))
        return x


class NothingAllowedError(QwenExportError):
    """A constraint allows none of the tokens that there are logits of."""


def _nothing_allowed(count: int) -> NothingAllowedError:
    return NothingAllowedError(
        "the constraint of the answer allows no token",
        got=f"{count} allowed tokens of the vocabulary, none of them usable here",
        fix="Loosen the grammar or the rules of the sampling parameters; one excludes what the other asks for.",
    )


def _check_peak(peak: float | np.floating[Any]) -> None:
    if not math.isfinite(peak):
        raise QwenExportError(
            "the model's output holds no usable logits",
            got=f"a maximum of {peak}",
            expected="a finite number",
            fix="Run `qwen-export verify` on this bundle; at reduced precision an activation may have overflowed.",
        )
