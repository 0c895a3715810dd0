"""Memory of the host: a numpy array. Untouched pages cost nothing, so a large cache capacity is free until it is used."""

from __future__ import annotations

import contextlib
import mmap
import sys
from array import array
from collections.abc import Sequence
from math import prod

import numpy as np

from qwen_export.runtimes.memory.buffers import ELEMENTS, INTEGERS, Buffer, Bytes

_MAPPED_FROM, _HUGE_PAGE = 64 << 10, 2 << 20


class HostBuffer(Buffer):
    def __init__(self, dtype: str, shape: tuple[int, ...], whole: HostBuffer | None = None, offset: int = 0) -> None:
        super().__init__(dtype, shape)
        self._map: mmap.mmap | None = None
        self._map_address = 0
        self._bytes: Bytes
        if whole is not None:
            self._map, self._bytes, self._map_address = whole._map, whole._bytes[offset : offset + self.nbytes], whole._map_address
        else:
            self._bytes = self._allocate()
        self._memory = self._bytes.data
        self._ints: memoryview[int] | None = None
        self.address = int(self._bytes.ctypes.data)

    def _allocate(self) -> Bytes:
        if self.nbytes < _MAPPED_FROM or sys.platform == "win32":
            return np.zeros(self.nbytes, np.uint8)
        # Fresh pages: an allocator may hand out memory that was used before, and has to clear it.
        spare = _HUGE_PAGE if self.nbytes >= _HUGE_PAGE else 0
        self._map = mmap.mmap(-1, self.nbytes + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages = np.frombuffer(self._map, np.uint8)
        self._map_address = int(pages.ctypes.data)
        self._begin = -int(pages.ctypes.data) % _HUGE_PAGE if spare else 0
        return pages[self._begin : self._begin + self.nbytes]

    def alike(self, nbytes: int) -> HostBuffer:
        return HostBuffer("uint8", (nbytes,))

    def part(self, dtype: str, shape: tuple[int, ...], offset: int = 0) -> HostBuffer:
        return HostBuffer(dtype, shape, self, offset)

    def prefer_huge_pages(self, axis: int, first: int) -> None:
        """From entry `first` of `axis` on. Long caches are read a few per cent faster with huge pages; at the front they would make every
        short text hold 2 MB per head. What is read and written as a whole has them from the start (`recurrent_memory.py`)."""
        if self._map is None or self.nbytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        run = prod(self.shape[axis:]) * ELEMENTS[self.dtype][0]
        skipped = run * first // self.shape[axis] // _HUGE_PAGE * _HUGE_PAGE
        for start in range(0, self.nbytes, run):
            if skipped < run and start % _HUGE_PAGE == 0:
                with contextlib.suppress(OSError):  # a kernel without them
                    self._map.madvise(mmap.MADV_HUGEPAGE, self._begin + start + skipped, run - skipped)

    def read(self, offset: int = 0, nbytes: int | None = None) -> Bytes:
        return self._bytes[offset : None if nbytes is None else offset + nbytes].copy()

    def write(self, data: Bytes, offset: int = 0) -> None:
        self._bytes[offset : offset + data.nbytes] = data

    def copy_from(self, other: Buffer, offset: int, start: int, nbytes: int) -> None:
        assert isinstance(other, HostBuffer)
        self._memory[offset : offset + nbytes] = other._memory[start : start + nbytes]

    def zero(self, offset: int, nbytes: int) -> None:
        self._bytes[offset : offset + nbytes] = 0

    def release(self, offset: int, nbytes: int) -> None:
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        begin = self.address - self._map_address + offset
        first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def write_ints(self, values: Sequence[int]) -> None:
        if self._ints is None:
            self._ints = self._memory.cast(INTEGERS[self.dtype])
        if len(values) == 1:
            self._ints[0] = values[0]
        else:
            self._ints[:] = memoryview(array(INTEGERS[self.dtype], values))

    def contents(self) -> Bytes:
        return self._bytes
