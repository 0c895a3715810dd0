"""Which engine has read the beginning of a prompt. A conversation comes back with its past, which one engine's prefix cache may have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

_BLOCK = 64
"""Tokens: shorter beginnings are read again as fast as they are looked for."""
_MOST = 1 << 16
"""Blocks that are remembered, 4 million tokens."""


class PromptRoutes:
    """Remembers the whole blocks of prompts by hash. A wrong guess costs time, never an answer."""

    def __init__(self) -> None:
        self._engine_of: OrderedDict[int, int] = OrderedDict()

    def find(self, ids: Sequence[int]) -> int | None:
        """The engine that was given the longest beginning of this prompt, the last one of several."""
        found = None
        for key in _keys(ids):
            if key not in self._engine_of:
                break
            found = self._engine_of[key]
        return found

    def remember(self, ids: Sequence[int], engine: int) -> None:
        for key in _keys(ids):
            self._engine_of[key] = engine
            self._engine_of.move_to_end(key)
        while len(self._engine_of) > _MOST:
            self._engine_of.popitem(last=False)


def _keys(ids: Sequence[int]) -> Iterator[int]:
    """One per whole block: of the block and of all before it."""
    key = 0
    for end in range(_BLOCK, len(ids) + 1, _BLOCK):
        key = hash((key, *ids[end - _BLOCK : end]))
        yield key
