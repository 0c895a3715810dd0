"""Which tokens a sequence already holds, for the sampling penalties."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class TokenHistory:
    """Counts of generated tokens, the set of prompt tokens, and all tokens in order.

    Presence and frequency penalties look at generated tokens only, the repetition penalty at prompt and generated tokens (the OpenAI API's
    and vLLM's definitions, which the recommended settings assume). `push` and `pop` are O(1); a speculative round pushes its drafts
    and pops the rejected ones, last first.
    """

    def __init__(self, prompt_ids: Iterable[int] = ()) -> None:
        self._text = np.fromiter(prompt_ids, np.int64)
        self._length = self._prompt_length = len(self._text)
        # Most answers have no penalties, so tokens are counted when something asks for counts.
        self._counted = 0
        self._table: NDArray[np.int32] = np.zeros(0, np.int32)
        """By id: four times the count, 2 more for a token in `_ids` and 1 for one of the prompt. Pages without a token take no memory."""
        self._ids: NDArray[np.int64] = np.zeros(0, np.int64)
        """Every token that was ever counted, once, and room for more."""
        self._known = 0

    def push(self, token_id: int) -> None:
        """One more generated token."""
        if self._length == len(self._text):
            self._text = np.concatenate([self._text, np.zeros(max(64, self._length // 4), np.int64)])
        self._text[self._length] = token_id
        self._length += 1

    def pop(self, token_id: int) -> None:
        """Take back the last `push`, which was of this token."""
        last = int(self._text[self._length - 1]) if self.new_tokens else None
        assert last == token_id, f"token {token_id} was not generated last"
        self._length -= 1
        if self._counted > self._length:
            self._counted = self._length
            self._table[token_id] -= 4

    def _count(self) -> NDArray[np.int32]:
        """The table, with all tokens counted."""
        if not self._counted and self._prompt_length:
            prompt = self._text[: self._prompt_length]
            self._ids = np.unique(prompt)
            self._known, self._counted = len(self._ids), self._prompt_length
            self._table = np.zeros(_size(int(prompt.max())), np.int32)
            self._table[prompt] = 3
        if self._counted < self._length:
            for token in self._text[self._counted : self._length].tolist():
                self._count_one(token)
            self._counted = self._length
        return self._table

    def _count_one(self, token_id: int) -> None:
        if token_id >= len(self._table):
            larger = np.zeros(_size(token_id), np.int32)
            larger[: len(self._table)] = self._table
            self._table = larger
        if not self._table[token_id]:
            if self._known == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros(max(64, self._known), np.int64)])
            self._ids[self._known] = token_id
            self._table[token_id] = 2
            self._known += 1
        self._table[token_id] += 4

    @property
    def new_tokens(self) -> int:
        """Number of generated tokens."""
        return self._length - self._prompt_length

    def text(self) -> NDArray[np.int64]:
        """All tokens of prompt and answer, i64[T], in order; valid until the next `push`."""
        return self._text[: self._length]

    def answer(self) -> NDArray[np.int64]:
        """The generated tokens, i64[n], in order; valid until the next `push`."""
        return self._text[self._prompt_length : self._length]

    def of(self, token_id: int) -> tuple[bool, int]:
        """Whether the sequence holds the token, and how often it was generated."""
        table = self._count()
        entry = int(table[token_id]) if token_id < len(table) else 0
        return entry % 2 > 0 or entry >= 4, entry >> 2

    def entries(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """What `counts_of` takes apart, of ids i32[n]: i32[n]."""
        table = self._count()
        if int(ids.max()) < len(table):
            return table.take(ids)
        known = ids < len(table)
        made = np.zeros(len(ids), np.int32)
        made[known] = table[ids[known]]
        return made

    def generated(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and counts (>= 1) of the generated tokens."""
        table, ids = self._count(), self._ids[: self._known]
        counts = table[ids].astype(np.int64) >> 2
        present = np.flatnonzero(counts)
        return ids[present], counts[present]

    def seen(self) -> NDArray[np.int64]:
        """Ids of all tokens of prompt and answer, each once."""
        table, ids = self._count(), self._ids[: self._known]
        entries = table[ids]
        return ids[(entries % 2 > 0) | (entries >= 4)]


def counts_of(entries: NDArray[np.int32]) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """As `TokenHistory.of`, for the entries of many tokens: whether the text has them, and how often they were generated."""
    counts = entries >> 2
    return (counts > 0) | (entries % 2 > 0), counts


def _size(token_id: int) -> int:
    """Entries of a table that has this id, with room for others."""
    return max(1024, 1 << token_id.bit_length())
