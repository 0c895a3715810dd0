"""A set of token ids, as one bit for each id of the vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class TokenSet:
    """Bit i % 32 of word i // 32 stands for token i; tokens behind the last word are not in the set.

    A choice among 64 candidates looks at single bits, and one among few tokens at those: the whole vocabulary as bool[V] costs 0.2 ms."""

    __slots__ = ("_few", "_words")

    def __init__(self, words: NDArray[np.uint32]) -> None:
        """`words` u32[V / 32]."""
        self._words = words
        self._few: tuple[int, NDArray[np.int64] | None] | None = None

    @classmethod
    def of(cls, allowed: NDArray[np.bool_]) -> TokenSet:
        """From bool[V]."""
        bits = np.packbits(allowed, bitorder="little")
        return cls(np.concatenate([bits, np.zeros(-len(bits) % 4, np.uint8)]).view("<u4"))

    @classmethod
    def single(cls, token: int) -> TokenSet:
        words = np.zeros(token // 32 + 1, np.uint32)
        words[-1] = np.uint32(1 << token % 32)
        return cls(words)

    def __contains__(self, token: Any) -> bool:
        word = token >> 5
        return word < len(self._words) and bool(int(self._words[word]) >> (token & 31) & 1)

    def few(self, most: int) -> NDArray[np.int64] | None:
        """The tokens i64[n], ascending, if they are at most `most`."""
        if self._few is None or self._few[0] != most:
            used = np.flatnonzero(self._words)
            found = None
            if len(used) <= most:
                bits = np.unpackbits(self._words[used].view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
                rows, columns = np.nonzero(bits)
                found = used[rows] * 32 + columns if len(rows) <= most else None
            self._few = (most, found)
        return self._few[1]

    def array(self, count: int) -> NDArray[np.bool_]:
        """Tokens 0 .. count - 1, as bool[count]."""
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little").view(np.bool_)
        return bits[:count] if len(bits) >= count else np.concatenate([bits, np.zeros(count - len(bits), np.bool_)])
