"""Tokens that may not come next: the logits rules of generation_config.json, with the meaning that they have in transformers.

All rules only forbid, so the largest logits of a row without the forbidden ones are those of the whole row. They hold for drafts as for the
model's own tokens, and depend on nothing but the tokens before: speculation changes no distribution.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwen_export.runtimes.sampling.token_history import TokenHistory

Words = tuple[tuple[int, ...], ...]


class Forbidden(NamedTuple):
    """Ids that may not come next: `always` is the same set in every call."""

    always: frozenset[int]
    now: frozenset[int]

    def __bool__(self) -> bool:
        return bool(self.always or self.now)

    def __contains__(self, token: object) -> bool:
        return token in self.always or token in self.now


NOTHING = Forbidden(frozenset(), frozenset())


class TokenRules:
    """What is forbidden behind a text.

    `suppress`: tokens that never come. `begin_suppress`: not as the first token of an answer. `bad_words`: sequences of tokens that are
    never completed; a stop token alone is no bad word. `ngram`: no sequence of that many tokens occurs twice in prompt and answer (0: off).
    `stop_ids` may not come before `min_new_tokens` tokens of the answer.
    """

    def __init__(
        self,
        suppress: Iterable[int] = (),
        begin_suppress: Iterable[int] = (),
        bad_words: Words = (),
        ngram: int = 0,
        min_new_tokens: int = 0,
        stop_ids: Collection[int] = (),
    ) -> None:
        single = {word[0] for word in bad_words if len(word) == 1} - set(stop_ids)
        self._always = frozenset(suppress) | single
        self._begin = frozenset(begin_suppress)
        self._words = tuple(word for word in bad_words if len(word) > 1)
        self._longest = max((len(word) for word in self._words), default=0)
        self._ngram, self._least, self._stop_ids = ngram, min_new_tokens, frozenset(stop_ids)
        self._depends = bool(self._begin or self._words or ngram or (min_new_tokens and self._stop_ids))
        self._static = Forbidden(self._always, frozenset())

    def __bool__(self) -> bool:
        """Whether anything can be forbidden."""
        return bool(self._always) or self._depends

    def forbidden(self, history: TokenHistory | None) -> Forbidden:
        """What may not follow; without a history, what may never come."""
        if history is None or not self._depends:
            return self._static
        now: set[int] = set()
        if not history.new_tokens:
            now |= self._begin
        if history.new_tokens < self._least:
            now |= self._stop_ids
        if self._words:
            end = tuple(history.text()[-self._longest :].tolist())
            now |= {word[-1] for word in self._words if len(word) <= len(history.text()) and end[1 - len(word) :] == word[:-1]}
        if self._ngram:
            now.update(_repeating(history.text(), self._ngram))
        return Forbidden(self._always, frozenset(now))


def _repeating(text: NDArray[np.int64], n: int) -> list[int]:
    """Tokens that would complete a sequence of `n` tokens that the text already holds."""
    if len(text) < n:
        return []
    if n == 1:
        return np.unique(text).tolist()
    # Where the last n - 1 tokens begin, as far as a token follows them.
    prefix = text[len(text) - n + 1 :]
    at = np.flatnonzero(text[: len(text) - n + 1] == prefix[0])
    for i in range(1, n - 1):
        at = at[text[at + i] == prefix[i]]
    found: list[int] = np.unique(text[at + n - 1]).tolist()
    return found
