"""How many tokens to draft: what maximises tokens per second by what was measured so far, none included.

    value(k) = (1 + a_1 + a_1 a_2 + ... + a_1..a_k) / (verify(k+1) + draft(k))

a_i is the measured share of rounds in which the i-th draft was accepted when those before it were; verify and draft are measured times.
What was not measured lately is taken from its neighbours: a_i from a_(i-1), times of a width from the next ones. So a length that might pay
is tried, which costs a few rounds at the start and now and then one, never a share of the stream.
"""

from __future__ import annotations

from typing import Protocol

# Rounds after which a measurement counts half: texts change.
_HALF_LIFE = 64
_FADE = 0.5 ** (1 / _HALF_LIFE)
# The acceptance before anything is measured: rather high, so that it is measured. Rounds that a guess weighs against measured ones.
_PRIOR, _GUESS_WEIGHT = 0.7, 2.0
# A verify of one more token, in plain steps, before it was measured; a draft likewise.
_WIDER, _DRAFT = 0.08, 0.25
# Samples of a time before it is believed.
_SURE = 2
# The shortest draft that is worth nearly as much as the best one: of many measured times some are too good by chance, most of all those of
# lengths that were seldom tried.
_NEARLY = 0.985
# Plain steps between two looks at all lengths: one costs as much as a step of a very small model, and plain times change slowly.
_LOOK_EVERY = 16
# Plain steps between two probes after drafting looked worse, doubled by each probe that confirms it.
_PROBE_AFTER = 64


class Policy(Protocol):
    """Decides the draft length round by round."""

    def length(self, limit: int) -> int:
        """Tokens to draft now, at most `limit`."""

    def observe(self, drafted: int, accepted: int, draft_s: float, verify_s: float) -> None:
        """What a round with `drafted` tokens came to; 0 drafted is a plain step. The verify's time includes choosing the tokens."""


class FixedLength:
    def __init__(self, count: int) -> None:
        self._count = count

    def length(self, limit: int) -> int:
        return min(self._count, limit)

    def observe(self, drafted: int, accepted: int, draft_s: float, verify_s: float) -> None:
        pass


class _Time:
    """A fading mean of seconds. Of the first samples the shortest counts: another may hold page faults or another process."""

    def __init__(self) -> None:
        self.value, self._weight, self._samples = 0.0, 0.0, 0

    def add(self, seconds: float) -> None:
        """One sample counts at most double: another process must not rule a length out."""
        self._samples += 1
        if self._samples <= _SURE:
            self.value, self._weight = min(seconds, self.value or seconds), 1.0
        else:
            self._weight = self._weight * _FADE + 1
            self.value += (min(seconds, 2 * self.value) - self.value) / self._weight

    @property
    def known(self) -> bool:
        return self._samples >= _SURE

    @property
    def sure(self) -> bool:
        """Whether enough was measured that one sample more changes little."""
        return self._samples >= _LOOK_EVERY


class _Acceptance:
    """Fading shares of kept drafts by position, given that those before were kept."""

    def __init__(self, longest: int) -> None:
        self._kept, self._seen = [0.0] * longest, [0.0] * longest

    def add(self, drafted: int, accepted: int) -> None:
        for i in range(len(self._seen)):
            self._kept[i] *= _FADE
            self._seen[i] *= _FADE
        for i in range(min(drafted, accepted + 1)):
            self._kept[i] += i < accepted
            self._seen[i] += 1

    def expected_tokens(self, count: int) -> float:
        """Of a round with `count` drafts."""
        expected, chance, share = 1.0, 1.0, _PRIOR
        for kept, seen in zip(self._kept[:count], self._seen[:count], strict=True):
            share = (kept + _GUESS_WEIGHT * share) / (seen + _GUESS_WEIGHT)
            chance *= share
            expected += chance
        return expected


class AdaptiveLength:
    """Measures while it goes; `longest` is the longest draft."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._acceptance = _Acceptance(longest)
        self._plain = _Time()
        self._verify = {1: self._plain} | {k + 1: _Time() for k in range(1, longest + 1)}
        self._draft = {k: _Time() for k in range(1, longest + 1)}
        self._since_draft, self._patience = 0, _PROBE_AFTER
        self._best: int | None = None
        """What was best when last looked, None when that is over."""

    def length(self, limit: int) -> int:
        limit = min(limit, self._longest)
        if limit <= 0 or not self._plain.known:
            return 0  # the plain step is what everything is compared with
        if self._best is None or self._best > limit:
            values = [self.value(count) for count in range(limit + 1)]
            enough = _NEARLY * max(values)
            self._best = next(count for count, value in enumerate(values) if value >= enough)
        if self._best == 0 and self._since_draft >= self._patience:
            return 1
        return self._best

    def observe(self, drafted: int, accepted: int, draft_s: float, verify_s: float) -> None:
        self._verify[drafted + 1].add(verify_s)
        if drafted:
            self._draft[drafted].add(draft_s)
            self._acceptance.add(drafted, accepted)
            self._patience = _PROBE_AFTER if self.value(1) > self.value(0) else min(2 * self._patience, 1 << 14)
            self._since_draft = 0
            self._best = None
        else:
            self._since_draft += 1
            if self._since_draft % _LOOK_EVERY == 0 or not self._plain.sure:
                self._best = None

    def value(self, count: int) -> float:
        """Expected tokens per second with drafts of that length."""
        return self._acceptance.expected_tokens(count) / (self._verify_s(count + 1) + self._draft_s(count))

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
