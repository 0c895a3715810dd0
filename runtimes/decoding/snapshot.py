"""What a sequence can go back to: a mark within its slot, or a snapshot that fits any decoder of the bundle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from qwen_export.runtimes.decoding.rotary_tables import Positions
from qwen_export.runtimes.decoding.sequence import Media, Prompt
from qwen_export.runtimes.memory.buffers import Bytes
from qwen_export.runtimes.memory.copies import Kept


@dataclass(frozen=True)
class Mark:
    """A point to go back to within one slot: recurrent states and conv histories after `tokens`. The caches are not copied, so it is
    small, and valid as long as the sequence still begins with these tokens. `accepted` tokens of `pending` are not in the states yet;
    `waiting` is the hidden state that the draft head has not read; `positions` are rotary positions other than those of text."""

    tokens: tuple[int, ...]
    states: dict[str, Kept]
    accepted: int = 0
    pending: dict[str, Kept] = field(default_factory=dict)
    waiting: Bytes = field(default_factory=lambda: np.zeros(0, np.uint8))
    media: tuple[Media, ...] = ()
    positions: Positions | None = None

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.tokens, self.media)


class CachePiece(NamedTuple):
    """Rows of the attention caches from token `start` on, by name, [Hkv,rows,D * element size] each."""

    start: int
    rows: dict[str, Kept]


@dataclass(frozen=True)
class Snapshot:
    """Everything that one sequence has read: self-contained, valid for any decoder of the same bundle. `caches` [Hkv,rows,D * element size]
    are rows from token `start` on; those before are in `earlier`, which other snapshots may share. Of rows in several pieces the last
    counts."""

    mark: Mark
    caches: dict[str, Kept]
    start: int = 0
    earlier: tuple[CachePiece, ...] = ()

    @property
    def pieces(self) -> tuple[CachePiece, ...]:
        return (*self.earlier, CachePiece(self.start, self.caches))
