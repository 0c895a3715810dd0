"""The results of a call: rows of logits, which stay on the device until they are read, and the largest of each row, which the graph has
picked. Choosing a token almost always needs no more than those."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from qwen_export.bundle_contract import TOP_IDS as TOP_IDS
from qwen_export.bundle_contract import TOP_LOGITS as TOP_LOGITS
from qwen_export.runtimes.memory.buffers import Buffer
from qwen_export.runtimes.memory.host_buffer import HostBuffer

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


class Top(NamedTuple):
    """The largest logits of a row, f32[K], and their ids, i32[K]; all other entries are at most the last, and behind it where they are
    equal. Not numpy's arrays: see `Distribution`."""

    logits: memoryview[float]
    ids: memoryview[int]

    def cut(self, start: int, end: int) -> Top:
        return Top(self.logits[start:end], self.ids[start:end])


class Rows:
    """Logits of N rows, valid until the next call. `array` is copied once, at its first use; so is whatever numpy is given them for.
    `rows[i]` is a row, which needs no copy of all to be sampled from; `rows[i:j]` an array."""

    def __init__(self, array: Callable[[], Floats], top: Callable[[], Top] | None = None, width: int = 0, known: Top | None = None) -> None:
        """`top` gives the largest entries of all rows, one row after the other, `width` of each; `known` are those, where the host has
        them without a copy."""
        self._read, self._read_top, self._width = array, top, width
        self._array: Floats | None = None
        self._top = known

    @classmethod
    def of(cls, array: Floats) -> Rows:
        return cls(lambda: array)

    @classmethod
    def none(cls) -> Rows:
        """Of a call without logits."""
        return cls.of(np.empty((0, 0), np.float32))

    @property
    def array(self) -> Floats:
        """All logits, f32[N,V]."""
        if self._array is None:
            self._array = self._read()
        return self._array

    def top(self, row: int) -> Top | None:
        """The largest entries of a row, None where the graph does not pick them."""
        if self._read_top is None:
            return None
        if self._top is None:
            self._top = self._read_top()
        return self._top.cut(row * self._width, (row + 1) * self._width)

    def tops(self) -> tuple[Floats, Ids] | None:
        """The largest entries of all rows, f32[N,K], and their ids, i32[N,K], as in `top`; None where the graph does not pick them."""
        if self._read_top is None:
            return None
        if self._top is None:
            self._top = self._read_top()
        logits, ids = self._top
        return np.asarray(logits).reshape(-1, self._width), np.asarray(ids).reshape(-1, self._width)

    def argmax(self) -> list[int]:
        """Of each row the id of the largest logit, the lowest one on a tie; the first NaN, if there is one."""
        tops = self.tops()
        if tops is None:
            return self.array.argmax(axis=1).tolist()
        logits, ids = tops[0][:, 0], tops[1][:, 0].tolist()
        return ids if np.isfinite(logits).all() else [row.argmax() for row in self]

    def part(self, start: int, count: int | None = None) -> Rows:
        """The rows from `start` on, `count` of them or all."""
        return self if not start and count is None else _Part(self, start, count)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def copy(self) -> Floats:
        """All logits, f32[N,V], for as long as they are wanted."""
        return self.array.copy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.array, dtype, copy=copy)

    def __len__(self) -> int:
        tops = self.tops()
        return len(self.array if tops is None else tops[1])

    def __iter__(self) -> Iterator[Row]:
        return (Row(self, row) for row in range(len(self)))

    @overload
    def __getitem__(self, row: int) -> Row: ...
    @overload
    def __getitem__(self, row: slice) -> Floats: ...
    def __getitem__(self, row: int | slice) -> Row | Floats:
        return Row(self, row) if isinstance(row, int) else self.array[row]


class _Part(Rows):
    """Rows of another one, from `start` on."""

    def __init__(self, whole: Rows, start: int, count: int | None) -> None:
        self._part = slice(start, None if count is None else start + count)
        super().__init__(lambda: whole.array[self._part])
        self._whole, self._start = whole, start

    def top(self, row: int) -> Top | None:
        return self._whole.top(self._start + row)

    def tops(self) -> tuple[Floats, Ids] | None:
        tops = self._whole.tops()
        return None if tops is None else (tops[0][self._part], tops[1][self._part])


class JoinedRows(Rows):
    """The first row of each of several results."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        super().__init__(lambda: np.stack([part.array[0] for part in parts]))
        self._parts = parts

    def top(self, row: int) -> Top | None:
        return self._parts[row].top(0)

    def tops(self) -> tuple[Floats, Ids] | None:
        tops = [part.tops() for part in self._parts]
        known = [top for top in tops if top is not None]
        if len(known) < len(tops):
            return None
        return np.stack([logits[0] for logits, _ in known]), np.stack([ids[0] for _, ids in known])


class Row:
    """One of the rows."""

    __slots__ = ("index", "rows")

    def __init__(self, rows: Rows, index: int) -> None:
        self.rows, self.index = rows, index

    @property
    def array(self) -> Floats:
        """Its logits, f32[V]."""
        return self.rows.array[self.index]

    @property
    def top(self) -> Top | None:
        return self.rows.top(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def argmax(self) -> int:
        """The id of the largest logit, the lowest one on a tie; the first NaN, if there is one."""
        top = self.top
        return top.ids[0] if top is not None and isfinite(top.logits[0]) else int(self.array.argmax())

    def copy(self) -> Floats:
        """Its logits, f32[V], for as long as they are wanted."""
        return self.array.copy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.array, dtype, copy=copy)


class LogitsBuffers:
    """Where a call leaves its logits, dtype and shape [..,N,V] as the graph has them, and the largest of them if it picks them. `together`:
    one buffer that has the largest and their ids, in this order; one copy transfers both from a device. `fetched`: where a call that makes
    this copy itself leaves them on the host."""

    def __init__(
        self,
        logits: Buffer,
        top_logits: Buffer | None = None,
        top_ids: Buffer | None = None,
        together: Buffer | None = None,
        fetched: HostBuffer | None = None,
    ) -> None:
        self._logits, self._top_logits, self._top_ids, self._together = logits, top_logits, top_ids, together
        self._width = top_ids.shape[-1] if top_ids is not None else 0
        # On the host the views are made once.
        self._host_top: Top | None = None
        if fetched is not None:
            self._host_top = _halves(fetched)
        elif isinstance(top_ids, HostBuffer) and top_ids.nbytes:
            self._host_top = self._top()

    def rows(self) -> Rows:
        """The results of the call that has just run."""
        return Rows(self._array, self._top if self._width else None, self._width, self._host_top)

    def _array(self) -> Floats:
        return self._logits.array().reshape(-1, self._logits.shape[-1])

    def _top(self) -> Top:
        if self._together is not None:
            return _halves(self._together)
        if self._top_logits is None or self._top_ids is None:
            raise AssertionError("the graph does not pick the largest logits")
        return Top(self._top_logits.contents().data.cast("f"), self._top_ids.contents().data.cast("i"))


def _halves(together: Buffer) -> Top:
    words, half = together.contents().data, together.nbytes // 2
    return Top(words[:half].cast("f"), words[half:].cast("i"))
