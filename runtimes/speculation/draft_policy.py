"""How many tokens to draft: what maximizes tokens per second by what was measured so far, none included.

    value(k) = (1 + a_1 + a_1 a_2 + ... + a_1..a_k) / seconds(k)

a_i is the measured share of rounds in which the i-th draft was accepted when those before it were; seconds(k) is the measured time of a
round of k drafts. What was not measured is taken from what was: a_i from a_(i-1), times from the line through the others. So a length that
might pay is tried, which costs a few rounds at the start and now and then one, never a share of the stream.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Protocol

# What a measurement still counts a round later: acceptance half after 64 rounds, for texts change; times after 256 of the same length.
_FADE, _TIME_FADE = 0.5 ** (1 / 64), 0.5 ** (1 / 256)
# The acceptance before anything is measured: rather high, so that it is measured. Rounds that a guess weighs against measured ones.
_PRIOR, _GUESS_WEIGHT = 0.7, 2.0
# What one more draft costs before it was measured, in plain steps: a step of the head and one more row to verify. Its weight in the slope.
_SLOPE, _STIFF = 0.33, 0.05
# Samples that the line through all lengths is worth next to a length's own: of many measured times some are too good or too bad by chance.
_LINE_WEIGHT = 6.0
# Samples of a time before it is believed, and those that count as the first ones.
_SURE, _FIRST = 3, 8
# How fast the machine's slowness follows what is measured.
_FOLLOW = 0.1
# A length is kept while it is worth nearly as much as the best one: another finds its memory cold, and may look better by chance.
_NEARLY = 0.98
# Rounds between two tries of another length, so that neither chance nor a time of long ago decides: at first and in the end. The rounds of
# a try: the first of another length finds its memory cold. The share of the best value from which on a length is worth one.
_TRY_EVERY, _TRY_SELDOM, _TRY, _WORTH_A_TRY = 24, 72, 3, 0.9
# Rounds between two looks at all lengths: one costs some of a step of a very small model.
_LOOK_EVERY = 6
# Plain steps between two tries after drafting looked worse, doubled by each that confirms it, up to a limit. The last ones are measured.
_PROBE_AFTER, _PROBE_SELDOM, _WATCHED = 64, 512, 16


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
            normal = min(normal, 2 * mean)
            self._weights[count] = self._weights[count] * _TIME_FADE + 1
            self._means[count] += (normal - mean) / self._weights[count]
            self._slowness *= 1 + _FOLLOW * (normal / mean - 1)
            self._slowness **= _FADE

    def weight(self, count: int) -> float:
        """How much was measured, in samples of now."""
        return self._weights[count]

    def known(self, count: int) -> bool:
        return len(self._first[count]) >= _SURE

    def seconds(self, limit: int) -> list[float]:
        """Of rounds with 0 .. limit drafts: what was measured, drawn to the line through all measurements where they are few. The plain
        step is measured, and begins the line."""
        plain = self._means[0]
        points = [(0, plain, 1.0), *((k, self._means[k], self._weights[k]) for k in range(1, len(self._means)) if self._weights[k])]
        weight = sum(w for _, _, w in points)
        k0, t0 = sum(w * k for k, _, w in points) / weight, sum(w * t for _, t, w in points) / weight
        covariance = sum(w * (k - k0) * (t - t0) for k, t, w in points)
        slope = (covariance + _STIFF * _SLOPE * plain) / (sum(w * (k - k0) ** 2 for k, _, w in points) + _STIFF)
        values = [plain]
        for k in range(1, limit + 1):
            line, own = t0 + max(0.0, slope) * (k - k0), self._weights[k]
            values.append((own * self._means[k] + _LINE_WEIGHT * line) / (own + _LINE_WEIGHT))
        return [self._slowness * value for value in values]


class KeptShares:
    """Fading shares of kept drafts by position, given that those before were kept. New ones count more instead of old ones less: the same
    shares, for less work a round."""

    def __init__(self, longest: int) -> None:
        self._kept, self._seen, self._gain = [0.0] * longest, [0.0] * longest, 1.0

    def add(self, drafted: int, accepted: int) -> None:
        self._gain /= _FADE
        for i in range(min(drafted, accepted + 1)):
            self._seen[i] += self._gain
        for i in range(accepted):
            self._kept[i] += self._gain
        if self._gain > 1e9:
            self._kept, self._seen = [x / self._gain for x in self._kept], [x / self._gain for x in self._seen]
            self._gain = 1.0

    def expected_tokens(self, limit: int) -> list[float]:
        """Of rounds with 0 .. limit drafts."""
        expected, chance, share, guess = [1.0], 1.0, _PRIOR, _GUESS_WEIGHT * self._gain
        for kept, seen in zip(self._kept[:limit], self._seen[:limit], strict=True):
            share = (kept + guess * share) / (seen + guess)
            chance *= share
            expected.append(expected[-1] + chance)
        return expected


class AdaptiveLength:
    """Measures while it goes; `longest` is the longest draft. `kept`: acceptance that others measure too, where only times differ."""

    def __init__(self, longest: int, kept: KeptShares | None = None) -> None:
        self._longest = longest
        self._acceptance = KeptShares(longest) if kept is None else kept
        self._times = _Times(longest)
        self._best, self._looked, self._tried = 0, False, 0
        self._rounds, self._next_try, self._patience = 0, _TRY_EVERY, _PROBE_AFTER
        self._rest = 0
        """Plain steps to go without a thought: some are as short as one."""

    def length(self, limit: int) -> int:
        if self._rest or limit <= 0 or not self._times.known(0):
            return 0  # the plain step is what everything is compared with
        limit = min(limit, self._longest)
        if not self._looked or self._best > limit:
            self._look(limit)
        return min(self._tried, limit) if self._rounds >= self._next_try else self._best

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
        self._rounds += 1
        if self._rounds % _LOOK_EVERY == 0 or not self._times.known(drafted):
            self._looked = False
        if self._rounds == self._next_try:
            self._tried = self._to_try()
        elif self._rounds >= self._next_try + _TRY:
            self._end_try()

    def _look(self, limit: int) -> None:
        values = self.values(limit)
        best, self._looked = max(values), True
        if self._best > limit or values[self._best] < _NEARLY * best:
            was, self._best = self._best, values.index(best)
            if was == 0:  # drafting begins
                self._patience = _PROBE_AFTER

    def _to_try(self) -> int:
        """In plain steps, the best draft. While drafting, the least measured of the lengths that may well be the best, the next ones, and
        none: a wrong time of the plain step would cost most."""
        values = self.values(self._longest)
        if self._best == 0:
            return max(range(1, self._longest + 1), key=values.__getitem__)
        enough = _WORTH_A_TRY * max(values)
        worth = (k for k, value in enumerate(values) if value >= enough or k == 0 or abs(k - self._best) == 1)
        return min(worth, key=self._times.weight)

    def _end_try(self) -> None:
        self._look(self._longest)
        if self._best == 0:
            self._patience = min(2 * self._patience, _PROBE_SELDOM)
            self._rest, self._next_try = self._patience - _WATCHED, self._rounds + _WATCHED
        else:
            self._next_try = self._rounds + min(_TRY_SELDOM, _TRY_EVERY + self._rounds // 8)

    def values(self, limit: int) -> list[float]:
        """Expected tokens per second with 0 .. limit drafts a round."""
        tokens, seconds = self._acceptance.expected_tokens(limit), self._times.seconds(limit)
        return [t / s for t, s in zip(tokens, seconds, strict=True)]
