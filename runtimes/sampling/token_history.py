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
        ids = np.unique(self._text)
        self._slot = {int(token): slot for slot, token in enumerate(ids)}
        self._ids = ids
        self._counts = np.zeros(len(ids), np.int64)
        self._in_prompt = np.ones(len(ids), bool)

    def push(self, token_id: int) -> None:
        """One more generated token."""
        slot = self._slot.setdefault(token_id, len(self._slot))
        if slot == len(self._ids):
            spare = max(64, slot)
            self._ids = np.concatenate([self._ids, np.zeros(spare, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(spare, np.int64)])
            self._in_prompt = np.concatenate([self._in_prompt, np.zeros(spare, bool)])
        self._ids[slot] = token_id
        self._counts[slot] += 1
        if self._length == len(self._text):
            self._text = np.concatenate([self._text, np.zeros(max(64, self._length // 4), np.int64)])
        self._text[self._length] = token_id
        self._length += 1

    def pop(self, token_id: int) -> None:
        """Take back the last `push`, which was of this token."""
        last = int(self._text[self._length - 1]) if self.new_tokens else None
        assert last == token_id, f"token {token_id} was not generated last"
        self._length -= 1
        self._counts[self._slot[token_id]] -= 1

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
        slot = self._slot.get(token_id)
        if slot is None:
            return False, 0
        count = int(self._counts[slot])
        return count > 0 or bool(self._in_prompt[slot]), count

    def of_each(self, ids: NDArray[np.int32]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """As `of`, for ids i32[n]: bool[n] and i64[n]."""
        slots = np.array([self._slot.get(token, -1) for token in ids.tolist()])
        known = slots >= 0
        counts = np.where(known, self._counts[slots], 0)
        return known & ((counts > 0) | self._in_prompt[slots]), counts

    def generated(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and counts (>= 1) of the generated tokens."""
        used = len(self._slot)
        present = np.flatnonzero(self._counts[:used])
        return self._ids[present], self._counts[present]

    def seen(self) -> NDArray[np.int64]:
        """Ids of all tokens of prompt and answer, each once."""
        used = len(self._slot)
        return self._ids[:used][self._in_prompt[:used] | (self._counts[:used] > 0)]
