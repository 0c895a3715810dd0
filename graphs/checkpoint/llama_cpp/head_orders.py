"""Orders of rows and columns that differ between llama.cpp and transformers.

A DeltaNet layer has r = Hv / Hk value heads for each key head. transformers keeps the value heads of a key head together (head k r + v);
llama.cpp has them Hk apart (head v Hk + k), so that a repeat of the key heads, one set behind the other, lines up with them. An order maps
positions of transformers to positions in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class Order(Protocol):
    def stored(self, positions: Indices) -> Indices:
        """Where the file has what transformers has at `positions`."""


@dataclass(frozen=True)
class ValueHeads:
    """The order of llama.cpp from position `first` on; what is before (queries and keys) is in the same place. `size` positions a head."""

    key_heads: int
    ratio: int
    size: int
    first: int = 0

    def stored(self, positions: Indices) -> Indices:
        head, inside = np.divmod(positions - self.first, self.size)
        key, value = np.divmod(head, self.ratio)
        return np.where(positions < self.first, positions, self.first + (value * self.key_heads + key) * self.size + inside)


@dataclass(frozen=True)
class PartOfGroups:
    """Positions `first` to `first + take - 1` of every `group`: b or a of in_proj_ba, whose rows are grouped by key head."""

    group: int
    first: int
    take: int

    def stored(self, positions: Indices) -> Indices:
        group, inside = np.divmod(positions, self.take)
        return group * self.group + self.first + inside


def runs(indices: Indices) -> list[tuple[int, int]]:
    """Ranges start..stop-1 whose positions, one range behind the other, are `indices`."""
    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(indices, cuts) if len(part)]
