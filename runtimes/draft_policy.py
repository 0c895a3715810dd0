"""How many tokens to draft: what maximises tokens per second by what was measured so far, none included.

    value(k) = (1 + a_1 + a_1 a_2 + ... + a_1..a_k) / (verify(k+1) + draft(k))

a_i is the measured share of rounds in which the i-th draft was accepted when those before it were; verify and draft are measured times.
Widths that were not tried yet are estimated from their neighbours. A width is tried when its value by an optimistic estimate is the
best, so that trying costs a few rounds at the start and now and then one, never a share of the stream.
"""

from __future__ import annotations

from typing import Protocol

# Rounds after which a measurement counts half: texts change.
_HALF_LIFE = 32
_FADE = 0.5 ** (1 / _HALF_LIFE)
# An acceptance that nobody has measured: rather high, so that it is measured.
_PRIOR, _PRIOR_WEIGHT = 0.7, 2.0
# A verify of one more token, in plain steps, before it was measured; a draft likewise.
_WIDER, _DRAFT = 0.08, 0.25
# Samples of a time before it is believed.
_SURE = 2
# Plain steps between two probes after drafting looked worse, doubled by each probe that confirms it.
_PROBE_AFTER = 64


class Policy(Protocol):
    """Decides the draft length round by round."""

    def length(self, limit: int) -> int:
        """Tokens to draft now, at most `limit`."""

    def observe(self, drafted: int, accepted: int, draft_s: float, verify_s: float) -> None:
        """What a round with `drafted` tokens came to; 0 drafted is a plain step."""


class FixedLength:
    def __init__(self, count: int) -> None:
        self._count = count

    def length(self, limit: int) -> int:
        return min(self._count, limit)

    def observe(self, drafted: int, accepted: int, draft_s: float, verify_s: float) -> None:
        pass


class _Mean:
    """A fading mean. The first sample of a time may hold a page fault or a graph being recorded: the second takes its place."""

    def __init__(self, value: float = 0.0, weight: float = 0.0) -> None:
        self.value, self.weight, self.samples = value, weight, 0

    def add(self, value: float) -> None:
        self.samples += 1
        self.weight = self.weight * _FADE + 1
        self.value += (value - self.value) / self.weight

    def add_time(self, seconds: float) -> None:
        """One sample counts at most double: another process must not rule a length out."""
        if self.samples < _SURE:
            self.value, self.samples, self.weight = seconds, self.samples + 1, 1.0
        else:
            self.add(min(seconds, 2 * self.value))

    @property
    def known(self) -> bool:
        return self.samples >= _SURE


class AdaptiveLength:
    """Measures while it goes; `longest` is the longest draft."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._acceptance = [_Mean(_PRIOR, _PRIOR_WEIGHT) for _ in range(longest)]
        self._plain = _Mean()
        self._verify = {1: self._plain} | {k + 1: _Mean() for k in range(1, longest + 1)}
        self._draft = {k: _Mean() for k in range(1, longest + 1)}
        self._since_draft, self._patience = 0, _PROBE_AFTER

    def length(self, limit: int) -> int:
        limit = min(limit, self._longest)
        if limit <= 0 or not self._plain.known:
            return 0  # the plain step is what everything is compared with
        best = max(range(limit + 1), key=self.value)
        if best == 0 and self._since_draft >= self._patience:
            return 1
        return best

    def observe(self, drafted: int, accepted: int, draft_s: float, verify_s: float) -> None:
        self._verify[drafted + 1].add_time(verify_s)
        for i in range(min(drafted, accepted + 1)):
            self._acceptance[i].add(float(i < accepted))
        if drafted:
            self._draft[drafted].add_time(draft_s)
            self._patience = _PROBE_AFTER if self.value(1) > self.value(0) else min(2 * self._patience, 1 << 14)
            self._since_draft = 0
        else:
            self._since_draft += 1

    def value(self, count: int) -> float:
        """Expected tokens per second with drafts of that length."""
        expected, chance = 1.0, 1.0
        for mean in self._acceptance[:count]:
            chance *= mean.value
            expected += chance
        return expected / (self._verify_s(count + 1) + self._draft_s(count))

    def _verify_s(self, width: int) -> float:
        known = {k: mean.value for k, mean in self._verify.items() if mean.known}
        return _between(known, width, _WIDER * self._plain.value)

    def _draft_s(self, count: int) -> float:
        known = {k: mean.value for k, mean in self._draft.items() if mean.known}
        return _between({0: 0.0, **known}, count, _DRAFT * self._plain.value)


def _between(known: dict[int, float], key: int, slope: float) -> float:
    """The measured value of `key`; between two measured ones on their line, beyond them by the slope of the nearest two, or `slope`."""
    if key in known:
        return known[key]
    below = max(k for k in known if k < key)
    above = min((k for k in known if k > key), default=None)
    if above is not None:
        share = (key - below) / (above - below)
        return known[below] * (1 - share) + known[above] * share
    before = max((k for k in known if k < below), default=None)
    if before is not None:
        slope = max(0.0, (known[below] - known[before]) / (below - before))
    return known[below] + slope * (key - below)
