"""Rotary tables: a row of cos and one of sin per row of the attention cache.

Text has the same rows in every sequence, position = cache row: those are made once for all slots. A sequence with positions of its own, as
pictures give it, has tables of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from qwen_export.manifest import Manifest, TensorSpec
from qwen_export.runtimes.memory.buffers import Buffer, Bytes, encode

TABLES = ("cos", "sin")
_TABLE_ROWS = 1024

MakeBuffer = Callable[[str, tuple[int, ...]], Buffer]
"""Element type and shape to zeroed memory."""


def rotary_rows(manifest: Manifest, name: str, positions: npt.ArrayLike, dtype: str) -> Bytes:
    """Rows of table `name`, "cos" or "sin", for positions [n]: [n, R/2] in `dtype`, as bytes."""
    rotary = manifest.rotary
    # fp32 products, as the reference computes them; then cos and sin of exactly those angles.
    angles = np.asarray(positions, np.float32)[:, None] * np.asarray(rotary.inv_freq, np.float32)
    return encode((np.cos(angles) if name == "cos" else np.sin(angles)) * np.float32(rotary.scaling), dtype)


class RotaryTables:
    """Tables for a decoder with room for `capacity` tokens per sequence. `specs`: the inputs of its graphs; `make` allocates memory that
    they can be bound to."""

    def __init__(self, manifest: Manifest, specs: Iterable[TensorSpec], make: MakeBuffer, capacity: int) -> None:
        self._manifest, self._make, self._capacity = manifest, make, capacity
        self._dtypes = {spec.name: spec.dtype for spec in specs if spec.name in TABLES}
        self._text = self._empty()
        self._rows = 0
        self._own: dict[int, _OwnTables] = {}
        self._made: dict[int, dict[str, Buffer]] = {}

    def of(self, slot: int) -> dict[str, Buffer]:
        """The tables of one sequence, by name."""
        own = self._own.get(slot)
        return self._text if own is None else own.tables

    def own(self, slot: int) -> bool:
        """Whether the sequence has positions of its own. Such a sequence shares no call with others."""
        return slot in self._own

    def any_own(self, slots: Iterable[int]) -> bool:
        """Whether one of these sequences has."""
        return bool(self._own) and any(slot in self._own for slot in slots)

    def fill(self, length: int) -> None:
        """Make the rows of the first `length` tokens of a text, and some that the next calls will need."""
        if length <= self._rows:
            return
        rows = min(self._capacity, length + _TABLE_ROWS)
        for start in range(self._rows, rows, _TABLE_ROWS):
            stop = min(rows, start + _TABLE_ROWS)
            self._write(self._text, start, range(start, stop))
        self._rows = rows

    def place(self, slot: int, start: int, positions: Sequence[int] | None, count: int) -> None:
        """Tokens `start` .. `start + count - 1` of a sequence are about to be read at these positions; None: as in text, one after
        the other."""
        own = self._own.get(slot)
        if own is None:
            if positions is None or list(positions) == list(range(start, start + count)):
                return
            # Memory is kept for the slot: calls that are bound to it stay right.
            if slot not in self._made:
                self._made[slot] = self._empty()
            own = self._own[slot] = _OwnTables(self._made[slot], list(range(start)))
            self._write(own.tables, 0, own.positions)
        del own.positions[start:]
        following = own.positions[-1] + 1 if own.positions else 0
        wanted = list(positions) if positions is not None else list(range(following, following + count))
        self._write(own.tables, start, wanted)
        own.positions += wanted

    def positions(self, slot: int, length: int) -> tuple[int, ...] | None:
        """Those of the first `length` tokens, None where they are those of text."""
        own = self._own.get(slot)
        return None if own is None else tuple(own.positions[:length])

    def restore(self, slot: int, positions: Sequence[int] | None) -> None:
        """Make the sequence one with these positions; None: text."""
        self._own.pop(slot, None)
        if positions is not None:
            self.place(slot, 0, positions, len(positions))

    def _empty(self) -> dict[str, Buffer]:
        half = len(self._manifest.rotary.inv_freq)
        return {name: self._make(dtype, (self._capacity, half)) for name, dtype in self._dtypes.items()}

    def _write(self, tables: dict[str, Buffer], start: int, positions: Sequence[int]) -> None:
        for name, table in tables.items():
            table.write(rotary_rows(self._manifest, name, positions, table.dtype), start * table.row_bytes)


class _OwnTables:
    """Tables of one sequence, and the position of each of its tokens."""

    def __init__(self, tables: dict[str, Buffer], positions: list[int]) -> None:
        self.tables, self.positions = tables, positions
