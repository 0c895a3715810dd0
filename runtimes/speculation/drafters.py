"""Where drafts come from: the checkpoint's own draft head, or the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.draft_head import DraftHead
from qwen_export.runtimes.sampling.distribution import Distribution
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.sampling.token_history import TokenHistory
from qwen_export.runtimes.speculation.acceptance import Acceptance, Draft


class Drafter(Protocol):
    """Guesses how a text goes on."""

    def draft(self, token: int, count: int, sampler: Sampler, acceptance: Acceptance, history: TokenHistory) -> Sequence[Draft]:
        """At most `count` tokens after `token`, which itself follows what the decoder has read. `history` holds `token` already."""


class HeadDrafter:
    """Drafts with the draft head, one token after the other; each is drawn as the sampler draws from the model."""

    def __init__(self, head: DraftHead) -> None:
        self._head = head

    def draft(self, token: int, count: int, sampler: Sampler, acceptance: Acceptance, history: TokenHistory) -> Sequence[Draft]:
        drafts: list[Draft] = []
        while len(drafts) < count:
            logits = self._head.following(drafts[-1].token, len(drafts)) if drafts else self._head.first(token)
            distribution = sampler.distribution(logits, history)
            drafts.append(Draft(acceptance.draft(distribution, len(drafts)), distribution))
            history.push(drafts[-1].token)
        for made in reversed(drafts):
            history.pop(made.token)
        return drafts


class LookupDrafter:
    """Drafts what followed the last tokens when they last occurred in the text (prompt lookup): for code, quotes and edits, and for
    checkpoints without a draft head. The longest repeated end of 4 to 2 tokens is looked for."""

    LONGEST, SHORTEST = 4, 2

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._seen: dict[tuple[int, ...], int] = {}
        self._text: list[int] = []

    def draft(self, token: int, count: int, sampler: Sampler, acceptance: Acceptance, history: TokenHistory) -> Sequence[Draft]:
        self._follow(token)
        text = self._text
        for n in range(min(self.LONGEST, len(text) - 1), self.SHORTEST - 1, -1):
            at = self._seen.get(tuple(text[-n:]))
            if at is not None:
                return [Draft(guess, Distribution.certain(guess)) for guess in text[at : at + count]]
        return []

    def _follow(self, token: int) -> None:
        """Bring the index to the decoder's text and `token`: for every run of tokens that ends before the last one, where it goes on. A
        stale entry costs a bad guess, never a wrong token, so what was read before is not compared again."""
        length = self._decoder.lengths[0]
        if len(self._text) > length:
            self._text, self._seen = [], {}
        known = max(1, len(self._text))
        self._text += (*self._decoder.tokens_from(len(self._text)), token)
        for end in range(known, len(self._text)):
            for n in range(self.SHORTEST, min(self.LONGEST, end) + 1):
                self._seen[tuple(self._text[end - n : end])] = end
