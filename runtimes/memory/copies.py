"""Copies of parts of buffers: on the host, or in one piece of memory of the device, where a copy is some twenty times as fast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from qwen_export.runtimes.memory.buffers import Buffer, Bytes
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer

Kept = Bytes | Buffer
"""What was copied: bytes on the host, or a buffer of the device."""


class HostCopies:
    """Copies to the host."""

    def rows(self, source: Buffer, start: int, pitch: int, width: int, height: int) -> Kept:
        """`height` rows of `width` bytes, `pitch` apart from `start` on, as bytes [height * width]."""
        made = np.empty((height, width), np.uint8)
        for row in range(height):
            made[row] = source.read(start + row * pitch, width)
        return made.reshape(-1)


class DeviceCopies(HostCopies):
    """Copies of at most `nbytes` together, in memory of the device. Raises BundleError where it has too little."""

    def __init__(self, nbytes: int, index: int) -> None:
        self._whole = CudaBuffer("uint8", (nbytes,), index)
        self._used = 0

    def rows(self, source: Buffer, start: int, pitch: int, width: int, height: int) -> Kept:
        assert isinstance(source, CudaBuffer)
        nbytes = width * height
        self._whole.take_rows(self._used, source, start, pitch, width, height)
        made = self._whole.part("uint8", (nbytes,), self._used)
        self._used += nbytes
        return made


def put(target: Buffer, offset: int, pitch: int, kept: Kept, height: int = 1) -> None:
    """The inverse of `rows`. Copies from the device are queued in front of the calls that follow."""
    width = kept.nbytes // height
    if isinstance(kept, Buffer):
        assert isinstance(target, CudaBuffer) and isinstance(kept, CudaBuffer)
        target.put_rows(offset, pitch, kept, width, height)
        return
    rows = kept.reshape(height, width)
    for row in range(height):
        target.write(rows[row], offset + row * pitch)


@contextmanager
def put_back(places: Iterable[tuple[Buffer, int, int]]) -> Iterator[None]:
    """What is in these places, from a byte on and so many bytes, is there again afterwards. The copies stay on the device."""
    kept = []
    for buffer, offset, nbytes in places:
        copy = buffer.alike(nbytes)
        copy.copy_from(buffer, 0, offset, nbytes)
        kept.append((buffer, offset, copy))
    try:
        yield
    finally:
        for buffer, offset, copy in kept:
            buffer.copy_from(copy, offset, 0, copy.nbytes)


def on_host(kept: Kept) -> Bytes:
    return kept.read() if isinstance(kept, Buffer) else kept
