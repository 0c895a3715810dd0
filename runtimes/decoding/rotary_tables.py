"""Rotary tables: a row of cos and one of sin per row of the attention cache.

Text has the same rows in every sequence, position = cache row: those are made once for all slots. A sequence with positions of its own, as
pictures give it, has tables of its own. A token of a picture has three positions (time, height, width), of which each frequency uses one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from qwen_export.manifest import Manifest, TensorSpec
from qwen_export.runtimes.memory.buffers import Buffer, Bytes, encode

Positions = npt.NDArray[np.int32]
"""Rotary positions of tokens, [n, 3]."""

TABLES = ("cos", "sin")
_TABLE_ROWS = 1024

MakeBuffer = Callable[[str, tuple[int, ...]], Buffer]
"""Element type and shape to zeroed memory."""


def rotary_rows(manifest: Manifest, name: str, positions: npt.ArrayLike, dtype: str) -> Bytes:
    """Rows of table `name`, "cos" or "sin", for positions [n] or [n, 3]: [n, R/2] in `dtype`, as bytes."""
    rotary, places = manifest.rotary, np.asarray(positions, np.float32)
    # fp32 products, as the reference computes them; then cos and sin of exactly those angles.
    each = places[:, None] if places.ndim == 1 else places[:, list(rotary.axes) or [0]]
    angles = each * np.asarray(rotary.inv_freq, np.float32)
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

    def place(self, slot: int, start: int, positions: npt.ArrayLike | None, count: int) -> None:
        """Tokens `start` .. `start + count - 1` of a sequence are about to be read at these positions, [count] or [count, 3]; None: as in
        text, one after the other."""
        own = self._own.get(slot)
        given = None if positions is None else _on_three_axes(positions)
        if own is None:
            if given is None or (given == np.arange(start, start + count)[:, None]).all():
                return
            # Memory is kept for the slot: calls that are bound to it stay right.
            if slot not in self._made:
                self._made[slot] = self._empty()
            own = self._own[slot] = _OwnTables(self._made[slot], self._capacity)
            before = _on_three_axes(range(start))
            self._write(own.tables, 0, before)
            own.put(0, before)
        following = own.following(start)
        wanted = _on_three_axes(range(following, following + count)) if given is None else given
        self._write(own.tables, start, wanted)
        own.put(start, wanted)

    def positions(self, slot: int, length: int) -> Positions | None:
        """Those of the first `length` tokens, [length, 3]; None where they are those of text."""
        own = self._own.get(slot)
        return None if own is None else own.first(length)

    def restore(self, slot: int, positions: Positions | None) -> None:
        """Make the sequence one with these positions; None: text."""
        self._own.pop(slot, None)
        if positions is not None:
            self.place(slot, 0, positions, len(positions))

    def _empty(self) -> dict[str, Buffer]:
        half = len(self._manifest.rotary.inv_freq)
        return {name: self._make(dtype, (self._capacity, half)) for name, dtype in self._dtypes.items()}

    def _write(self, tables: dict[str, Buffer], start: int, positions: npt.ArrayLike) -> None:
        for name, table in tables.items():
            table.write(rotary_rows(self._manifest, name, positions, table.dtype), start * table.row_bytes)


class _OwnTables:
    """Tables of one sequence, and the positions of each of its tokens."""

    def __init__(self, tables: dict[str, Buffer], capacity: int) -> None:
        self.tables = tables
        # Memory that no token has reached costs nothing.
        self._positions = np.zeros((capacity, 3), np.int32)
        self._largest = np.zeros(capacity, np.int32)

    def put(self, start: int, positions: Positions) -> None:
        stop = start + len(positions)
        self._positions[start:stop] = positions
        largest = np.maximum.accumulate(positions.max(axis=1)) if stop > start else positions[:, 0]
        self._largest[start:stop] = np.maximum(largest, self.following(start) - 1)

    def following(self, length: int) -> int:
        """The position of a text token after the first `length` tokens: behind all of theirs."""
        return int(self._largest[length - 1]) + 1 if length else 0

    def first(self, length: int) -> Positions:
        return self._positions[:length].copy()


def _on_three_axes(positions: npt.ArrayLike) -> Positions:
    given = np.asarray(positions, np.int32)
    return np.repeat(given[:, None], 3, axis=1) if given.ndim == 1 else given
