"""Which of a round's drafts stay, so that the tokens have the model's distribution.

Two ways. By rejection (Leviathan et al. 2023, arXiv 2211.17192, theorem 1), which keeps as many drafts as can be:

    keep d while u < p(d) / q(d)            u uniform in [0, 1), p the model's distribution, q that the draft was drawn from
    else the next token ~ max(p - q, 0), normalized

By shared numbers, for a given seed: number i of the seed's sequence chooses token i of the answer, from q for the draft and from p for the
token itself, and a draft stays if both choices are the same. The answer is then the one that the seed gives without drafts, whatever
was drafted; a few more drafts are lost. Greedy sampling is the case in which p and q have one token each, either way.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from qwen_export.runtimes.sampling.distribution import Distribution, residual
from qwen_export.runtimes.sampling.sampler import Sampler


class Draft:
    """A guess at a token, and the distribution that it was drawn from."""

    __slots__ = ("distribution", "token")

    def __init__(self, token: int, distribution: Distribution) -> None:
        self.token, self.distribution = token, distribution


class Acceptance(Protocol):
    """`ahead` counts tokens from the next one of the answer (0)."""

    def number(self, ahead: int) -> float:
        """The number in [0, 1) that chooses a token where there is no draft of it."""

    def next_number(self) -> float:
        """Number 0, of a token that is settled with it."""

    def draft(self, q: Distribution, ahead: int) -> int:
        """Draw a draft."""

    def token(self, p: Distribution, draft: Draft | None, ahead: int) -> int:
        """The token itself: that of the draft if it stays."""

    def advance(self, count: int) -> None:
        """That many tokens are settled."""


class Rejection:
    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def number(self, ahead: int) -> float:
        return self._rng.random()

    def next_number(self) -> float:
        return self._rng.random()

    def draft(self, q: Distribution, ahead: int) -> int:
        return q.draw(self._rng.random()) if len(q.ids) > 1 else int(q.ids[0])

    def token(self, p: Distribution, draft: Draft | None, ahead: int) -> int:
        if draft is None:
            return self.draft(p, ahead)
        likely, guessed = p.of(draft.token), draft.distribution.of(draft.token)
        if likely >= guessed or self._rng.random() * guessed < likely:
            return draft.token
        return self.draft(residual(p, draft.distribution), ahead)

    def advance(self, count: int) -> None:
        pass


class SharedNumbers:
    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._coming: list[float] = []

    def number(self, ahead: int) -> float:
        while len(self._coming) <= ahead:
            self._coming.append(self._rng.random())
        return self._coming[ahead]

    def next_number(self) -> float:
        return self._coming.pop(0) if self._coming else self._rng.random()

    def draft(self, q: Distribution, ahead: int) -> int:
        return q.draw(self.number(ahead))

    def token(self, p: Distribution, draft: Draft | None, ahead: int) -> int:
        return self.draft(p, ahead)

    def advance(self, count: int) -> None:
        del self._coming[:count]


def acceptance_for(sampler: Sampler) -> Acceptance:
    """Shared numbers where the user gave a seed, and expects the same text again."""
    return SharedNumbers(sampler.rng) if sampler.params.seed is not None else Rejection(sampler.rng)
