"""How many tokens to draft: what maximizes tokens per second by what was measured so far, none included.

    value(k) = (1 + a_1 + a_1 a_2 + ... + a_1..a_k) / seconds(k)

a_i is the measured share of rounds in which the i-th draft was accepted when those before it were; seconds(k) is the measured time of a
round of k drafts. What was not measured is taken from what was: a_i from a_(i-1), times from the line through the others.

What was accepted counts less with every token since, and then the guess from before the first token counts again. So drafts that did not
pay come back for a round when enough text has gone by, the later the dearer they are, and there are no other rounds for measuring
acceptance. Rounds for measuring times are those of a length that may be the best one within the deviation of its time.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Protocol

# Tokens after which an acceptance counts half, for texts change; rounds of the same length after which its time does.
_HALF_TEXT, _HALF_TIME = 128.0, 256.0
# The acceptance before anything is measured: rather high, so that it is measured, and drafts that are long where they are kept teach most.
# Rounds that it weighs against measured ones, and those that the acceptance of a draft weighs in that of the next one.
_PRIOR, _PRIOR_WEIGHT, _NEXT_WEIGHT = 0.8, 2.5, 4.0
# What one more draft costs before it was measured, in plain steps: a step of the head and one more row to verify. Its weight in the slope.
_SLOPE, _STIFF = 0.33, 0.05
# Relative standard deviations: of times from the line through all lengths, since kernels change with the number of rows, and of times of
# one length, before it is measured. The samples that this weighs.
_BENT, _NOISE, _NOISE_WEIGHT = 0.06, 0.05, 8.0
# Samples that the measured deviation goes back, and the most that one of them counts.
_NOISE_SAMPLES, _MOST_OFF = 64.0, 0.3
# Samples of a time before it is believed, those that count as the first ones, and those from which on a plain step is known well enough.
_SURE, _FIRST, _TRUSTED = 3, 8, 5
# How fast the machine's slowness follows what is measured, and the rounds in which it returns half to none.
_FOLLOW, _HALF_SLOWNESS = 0.1, 64.0
_TIME_FADE, _SLOWNESS_FADE = 0.5 ** (1 / _HALF_TIME), 0.5 ** (1 / _HALF_SLOWNESS)
# A length is kept while it is worth nearly as much as the best one: another finds its memory cold, and may look better by chance.
_NEARLY = 0.985
# Rounds between two tries of a length whose time is in doubt, at first and in the end. The rounds of a try: the first of another length
# finds its memory cold.
_TRY_EVERY, _TRY_SELDOM, _TRY = 24, 96, 3
# Rounds between two looks at all lengths, in the end: one takes some 10 us. In plain steps, the shortest rounds, there is a look in about
# so many seconds, and at most so many of them go without a thought.
_LOOK_EVERY, _LOOK_S, _REST = 6, 0.003, 6


class Policy(Protocol):
    """Decides the draft length round by round."""

    def length(self, limit: int) -> int:
        """Tokens to draft now, at most `limit`."""

    def observe(self, drafted: int, accepted: int, seconds: float) -> None:
        """What a round with `drafted` tokens came to; 0 drafted is a plain step. The time includes choosing the tokens."""


class FixedLength:
    def __init__(self, count: int) -> None:
        self._count = count

    def length(self, limit: int) -> int:
        return min(self._count, limit)

    def observe(self, drafted: int, accepted: int, seconds: float) -> None:
        pass


class _Times:
    """Fading means of a round's seconds by draft length, at the machine's present slowness.

    Slowness is one factor for all lengths, followed from round to round: a neighbor on the machine, a lower clock or a longer context
    slows all of them, also those that were last measured before it.
    """

    def __init__(self, longest: int) -> None:
        self._means, self._weights = [0.0] * (longest + 1), [0.0] * (longest + 1)
        self._first: list[list[float]] = [[] for _ in range(longest + 1)]
        self._slowness, self._last = 1.0, 0
        self._variance, self._variance_weight = _NOISE**2, _NOISE_WEIGHT
        """Of a sample, relative to its mean, and the samples that it is from."""

    def add(self, count: int, seconds: float) -> None:
        """Of the first samples the second shortest counts: some hold page faults, or kernels that run for the first time. Too short a time
        is soon put right, since its length is chosen. Later one sample counts at most double."""
        cold, self._last = count != self._last, count
        normal, first = seconds / self._slowness, self._first[count]
        if len(first) < _FIRST:
            bisect.insort(first, normal)
            self._means[count], self._weights[count] = first[min(1, len(first) - 1)], len(first) if self.known(count) else 0.0
        elif not cold:
            mean = self._means[count]
            off = min(normal, 2 * mean) / mean - 1
            self._weights[count] = self._weights[count] * _TIME_FADE + 1
            self._means[count] += off * mean / self._weights[count]
            self._variance_weight = min(self._variance_weight + 1, _NOISE_SAMPLES)
            self._variance += (min(abs(off), _MOST_OFF) ** 2 - self._variance) / self._variance_weight
            self._slowness = (self._slowness * (1 + _FOLLOW * off)) ** _SLOWNESS_FADE

    def samples(self, count: int) -> int:
        """Of the first ones."""
        return len(self._first[count])

    def known(self, count: int) -> bool:
        return self.samples(count) >= _SURE

    def deviation(self, count: int) -> float:
        """How far, relatively, the time of a length may be from what `seconds` says."""
        return float((self._weights[count] / self._variance + 1 / _BENT**2) ** -0.5)

    def seconds(self, limit: int) -> list[float]:
        """Of rounds with 0 .. limit drafts: what was measured, drawn to the line through all measurements as far as samples are few and
        differ. The plain step is measured, and begins the line."""
        plain = self._means[0]
        total, of_k, of_kk, of_t, of_kt = 1.0, 0.0, 0.0, plain, 0.0
        for k in range(1, len(self._means)):
            weight, mean = self._weights[k], self._means[k]
            total += weight
            of_t += weight * mean
            of_k += weight * k
            of_kk += weight * k * k
            of_kt += weight * k * mean
        k0, t0 = of_k / total, of_t / total
        slope = max(0.0, (of_kt - k0 * of_t + _STIFF * _SLOPE * plain) / (of_kk - k0 * of_k + _STIFF))
        values, line_weight = [plain], self._variance / _BENT**2
        for k in range(1, limit + 1):
            line, own = t0 + slope * (k - k0), self._weights[k]
            values.append((own * self._means[k] + line_weight * line) / (own + line_weight))
        return [self._slowness * value for value in values]


class KeptShares:
    """Fading shares of kept drafts by position, given that those before were kept. New ones count more instead of old ones less: the same
    shares, for less work a round."""

    def __init__(self, longest: int) -> None:
        self._kept, self._seen, self._gain = [0.0] * longest, [0.0] * longest, 1.0

    def add(self, drafted: int, accepted: int) -> None:
        for i in range(min(drafted, accepted + 1)):
            self._seen[i] += self._gain
        for i in range(accepted):
            self._kept[i] += self._gain

    def fade(self, tokens: float) -> None:
        """So much text has gone by."""
        self._gain *= 2.0 ** (tokens / _HALF_TEXT)
        if self._gain > 1e9:
            self._kept, self._seen = [x / self._gain for x in self._kept], [x / self._gain for x in self._seen]
            self._gain = 1.0

    def expected_tokens(self, limit: int) -> list[float]:
        """Of rounds with 0 .. limit drafts."""
        expected, chance, share, guess = [1.0], 1.0, _PRIOR, _PRIOR_WEIGHT * self._gain
        for kept, seen in zip(self._kept[:limit], self._seen[:limit], strict=True):
            share = (kept + guess * share) / (seen + guess)
            chance *= share
            expected.append(expected[-1] + chance)
            guess = _NEXT_WEIGHT * self._gain
        return expected


class AdaptiveLength:
    """Measures while it goes; `longest` is the longest draft. `kept`: acceptance that others measure too, where only times differ."""

    def __init__(self, longest: int, kept: KeptShares | None = None) -> None:
        self._longest = longest
        self._acceptance = KeptShares(longest) if kept is None else kept
        self._times = _Times(longest)
        self._best, self._tried, self._next_look = 0, -1, 0
        self._rounds, self._next_try = 0, _TRY_EVERY
        self._rest = 0

    def length(self, limit: int) -> int:
        if self._rest or limit <= 0 or not self._times.known(0):
            return 0  # the plain step is what everything is compared with
        limit = min(limit, self._longest)
        if self._rounds >= self._next_look or self._best > limit:
            self._look(limit)
        return min(self._tried, limit) if self._tried >= 0 else self._best

    def time_of(self, drafted: int, seconds: float) -> None:
        """What a round with so many drafts takes, measured before there is a text: nothing is known of its acceptance."""
        self._times.add(drafted, seconds)

    def observe(self, drafted: int, accepted: int, seconds: float) -> None:
        self.observe_rows(drafted, [(drafted, accepted)], seconds)

    def observe_rows(self, drafted: int, rows: Sequence[tuple[int, int]], seconds: float) -> None:
        """A round of several sequences: drafts made and kept of each, at most `drafted`."""
        if self._rest:
            self._rest -= 1
            return
        self._times.add(drafted, seconds)
        for own, accepted in rows:
            if own:
                self._acceptance.add(own, accepted)
        self._acceptance.fade(1 + sum(accepted for _, accepted in rows) / max(1, len(rows)))
        self._rounds += 1
        if not self._times.known(drafted):
            self._next_look = self._rounds
        if self._rounds == self._next_try:
            self._tried = self._to_try()
            if self._tried < 0:
                self._next_try = self._rounds + _TRY_EVERY
        elif self._tried >= 0 and self._rounds >= self._next_try + _TRY:
            self._tried, self._next_look = -1, self._rounds
            self._next_try = self._rounds + min(_TRY_SELDOM, _TRY_EVERY + self._rounds // 8)

    def _look(self, limit: int) -> None:
        values = self.values(limit)
        best = max(values)
        if self._best > limit or values[self._best] < _NEARLY * best:
            self._best = values.index(best)
        self._next_look = self._rounds + min(_LOOK_EVERY, 1 + self._rounds // 8)
        if self._best == 0 and self._tried < 0:
            seconds = max(1e-9, self._times.seconds(0)[0])
            self._rest, self._next_look = min(_REST, self._rounds // 32, int(_LOOK_S / seconds)), self._rounds + 1
            self._acceptance.fade(self._rest)

    def _to_try(self) -> int:
        """The length that would be the best one by most if its time were shorter by its deviation; -1 where there is none. At first the
        plain step: a wrong time of it would cost most."""
        if self._times.samples(0) < _TRUSTED:
            return 0
        values = self.values(self._longest)
        most, length = max((value * (1 + self._times.deviation(k)), k) for k, value in enumerate(values) if k != self._best)
        return length if most > values[self._best] else -1

    def values(self, limit: int) -> list[float]:
        """Expected tokens per second with 0 .. limit drafts a round."""
        tokens, seconds = self._acceptance.expected_tokens(limit), self._times.seconds(limit)
        return [t / s for t, s in zip(tokens, seconds, strict=True)]
