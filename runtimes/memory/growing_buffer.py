"""Attention caches on a GPU that grow for each sequence alone: addresses for the whole capacity, memory for the rows that are used.

Growing copies nothing, moves no address, so calls that are bound or recorded stay right, and takes no memory for other sequences.
"""

from __future__ import annotations

import sys
from math import lcm, prod

from qwen_export.runtimes.memory import cuda_memory, cuda_pages
from qwen_export.runtimes.memory.buffers import ELEMENTS
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer, settle


def row_step(dtype: str, shape: tuple[int, ...], index: int) -> int:
    """Rows of a cache [B,Hkv,S,W] that a page holds: memory comes for so many at a time. A row that is larger takes several pages."""
    return max(1, cuda_pages.page_bytes(index) // _row_bytes(dtype, shape))


def row_multiple(dtype: str, shape: tuple[int, ...], index: int) -> int:
    """Rows that fill whole pages: S is a multiple of so many, so that no two heads share a page."""
    width = _row_bytes(dtype, shape)
    return lcm(cuda_pages.page_bytes(index), width) // width


def _row_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape[3:]) * ELEMENTS[dtype][0]


class GrowingBuffer(CudaBuffer):
    """A cache [B,Hkv,S,W], S a multiple of `row_multiple`. Only rows that are held may be touched; new ones are zero."""

    def __init__(self, dtype: str, shape: tuple[int, ...], index: int = 0) -> None:
        self.step = row_step(dtype, shape, index)
        if shape[2] % row_multiple(dtype, shape, index):
            raise AssertionError(f"{shape[2]} rows are no multiple of {row_multiple(dtype, shape, index)}")
        self._pieces: list[list[int]] = [[] for _ in range(shape[0])]  # addresses of pieces that have memory, by slot
        super().__init__(dtype, shape, index)
        self._width = _row_bytes(dtype, shape)
        self.page_bytes = cuda_pages.page_bytes(index)

    def _allocate(self) -> int:
        return cuda_pages.reserve(self.nbytes, self.index)

    def __del__(self) -> None:
        if sys.is_finalizing() or not hasattr(self, "address"):
            return
        for slot in range(len(self._pieces)):
            self._drop(slot, 0)
        cuda_pages.give_back(self.address, self.nbytes)

    def held(self, slot: int) -> int:
        """Rows of each head of a slot that have memory."""
        return len(self._pieces[slot]) // self.shape[1] * self.page_bytes // self._width

    def bytes_for(self, rows: int) -> int:
        """What so many rows of one slot take."""
        return self._pages(rows) * self.shape[1] * self.page_bytes

    def _pages(self, rows: int) -> int:
        """Pages of the first rows of one head."""
        return -(-rows * self._width // self.page_bytes)

    def hold(self, slot: int, rows: int) -> None:
        """Have memory for the first `rows` rows of each head of a slot, rounded up to whole pages, and no more. Raises BundleError where
        the GPU has too little; what was held stays."""
        had, wanted = len(self._pieces[slot]) // self.shape[1], self._pages(rows)
        if wanted <= had:
            self._drop(slot, wanted * self.shape[1])
            return
        run = self.row_bytes // self.shape[1]
        pieces = self._pieces[slot]
        try:
            for number in range(had, wanted):
                for head in range(self.shape[1]):
                    address = self.address + slot * self.row_bytes + head * run + number * self.page_bytes
                    cuda_pages.map_pages(address, self.page_bytes, self.index)
                    pieces.append(address)
        except BaseException:
            self._drop(slot, had * self.shape[1])
            raise
        cuda_memory.wait()

    def _drop(self, slot: int, keep: int) -> None:
        """Give back all pieces of a slot but the first `keep`."""
        pieces = self._pieces[slot]
        if len(pieces) > keep:
            settle(self.index)
        while len(pieces) > keep:
            cuda_pages.unmap_pages(pieces.pop(), self.page_bytes)
