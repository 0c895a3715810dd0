"""Where drafts come from: the checkpoint's own draft head, or the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qwen_export.runtimes.decoding.decoder import Decoder, Follower
from qwen_export.runtimes.sampling.distribution import Distribution
from qwen_export.runtimes.sampling.sampler import NothingAllowedError, Sampler
from qwen_export.runtimes.sampling.token_history import TokenHistory
from qwen_export.runtimes.speculation.acceptance import Acceptance, Draft


class Drafter(Protocol):
    """Guesses the next tokens of one slot."""

    def begin(self) -> None:
        """An answer begins: do what need not be done in its rounds."""

    def draft(self, token: int, count: int, sampler: Sampler, acceptance: Acceptance, history: TokenHistory) -> Sequence[Draft]:
        """At most `count` tokens after `token`, which itself follows what the decoder has read. `history` holds `token` already."""


def forced_drafts(sampler: Sampler, history: TokenHistory, most: int, count: int) -> list[Draft]:
    """What a constraint forces behind the text, as drafts: one verify reads them without a drafter. At most `most`, and none where a
    drafter would make more, `count`."""
    tokens = sampler.forced(history)[: max(0, most)]
    return [Draft(token, Distribution.certain(token)) for token in tokens] if len(tokens) >= max(1, count) else []


class HeadDrafter:
    """Drafts with the draft head, one token after the other; each is drawn as the sampler draws from the model."""

    def __init__(self, head: Follower, slot: int = 0) -> None:
        self._head, self._slot = head, slot

    def begin(self) -> None:
        pass

    def draft(self, token: int, count: int, sampler: Sampler, acceptance: Acceptance, history: TokenHistory) -> Sequence[Draft]:
        head, slot = self._head, self._slot
        drafts: list[Draft] = []
        try:
            while len(drafts) < count:
                logits = (head.following({slot: drafts[-1].token}, len(drafts)) if drafts else head.first({slot: token}))[slot]
                try:
                    distribution = sampler.distribution(logits, history)
                except NothingAllowedError:  # the head knows fewer tokens than the model
                    break
                drafts.append(Draft(acceptance.draft(distribution, len(drafts)), distribution))
                history.push(drafts[-1].token)
        finally:
            for draft in reversed(drafts):
                history.pop(draft.token)
        return drafts


class LookupDrafter:
    """Drafts what followed the last tokens when they last occurred in the text (prompt lookup): for code, quotes and edits, and for
    checkpoints without a draft head. The longest repeated end of 4 to 2 tokens is taken.

    The text is kept as one array of 4 bytes per token and searched from its end. That costs some 0.1 ms at 262k tokens, where a step costs
    a hundred times that, and nothing is built when an answer begins."""

    LONGEST, SHORTEST = 4, 2

    def __init__(self, decoder: Decoder, slot: int = 0) -> None:
        self._sequence = decoder.sequences[slot]
        self._text: npt.NDArray[np.int32] = np.empty(1024, np.int32)
        self._length, self._edits = 0, 0

    def begin(self) -> None:
        self._follow()

    def draft(self, token: int, count: int, sampler: Sampler, acceptance: Acceptance, history: TokenHistory) -> Sequence[Draft]:
        self._follow()
        self._append([token])
        self._length -= 1  # the decoder has not read it
        text = self._text[: self._length + 1]
        at = self._continuation(text)
        guesses = text[at : at + count].tolist() if at else []
        return [Draft(guess, Distribution.certain(guess)) for guess in guesses[: sampler.fitting(history, guesses)]]

    def _continuation(self, text: npt.NDArray[np.int32]) -> int:
        """Where the text went on after the last earlier occurrence of its end; 0 where there is none."""
        if len(text) <= self.SHORTEST:
            return 0
        # Ends of earlier occurrences of the shortest run, then those of them that match further back.
        ends = np.flatnonzero((text[1:-1] == text[-1]) & (text[:-2] == text[-2])) + 1
        found = int(ends[-1]) + 1 if len(ends) else 0
        for n in range(self.SHORTEST, min(self.LONGEST, len(text) - 1)):
            ends = ends[(ends >= n) & (text[ends - n] == text[-1 - n])]
            if not len(ends):
                break
            found = int(ends[-1]) + 1
        return found

    def _follow(self) -> None:
        """Bring the copy to the text of the sequence."""
        tokens = self._sequence.tokens
        self._length = min(self._length, len(tokens))
        if self._edits != self._sequence.edits:  # once an answer: keep what is the same
            self._edits = self._sequence.edits
            if self._length:
                new = np.asarray(tokens[: self._length], np.int32)
                changed = np.flatnonzero(self._text[: self._length] != new)
                self._length = int(changed[0]) if len(changed) else self._length
        if len(tokens) > self._length:
            self._append(tokens[self._length :])

    def _append(self, tokens: Sequence[int]) -> None:
        end = self._length + len(tokens)
        if end > len(self._text):
            self._text = np.concatenate([self._text[: self._length], np.empty(end + end // 2 - self._length, np.int32)])
        self._text[self._length : end] = tokens
        self._length = end
