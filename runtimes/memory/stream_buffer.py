"""Device memory whose copies take their turn on a stream, so that no caller waits for them before the end of a call.

Small buffers (controls) are written through a mirror in locked host memory, and all are read through one. A write is queued in front
of the call that reads it; a call queues the copies of its results after itself, and when the call is waited for they are on the host.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

import numpy as np

from qwen_export.runtimes.memory import cuda_memory
from qwen_export.runtimes.memory.buffers import INTEGERS, Buffer, Bytes
from qwen_export.runtimes.memory.cuda_stream import Stream
from qwen_export.runtimes.memory.pinned_memory import PinnedMemory

_SMALL = 64 << 10


class StreamBuffer(Buffer):
    """Memory on the stream's device."""

    def __init__(self, dtype: str, shape: tuple[int, ...], stream: Stream) -> None:
        super().__init__(dtype, shape)
        self._stream = stream
        self.address = cuda_memory.allocate(self.nbytes, stream.handle)
        self._mirror: PinnedMemory | None = None
        self._queued_at = -1  # the stream's count of waits when a copy from the mirror was queued last
        self._fetched = False
        self._ints: memoryview[int] | None = None

    def __del__(self) -> None:
        if getattr(self, "address", 0) and not sys.is_finalizing():
            cuda_memory.free(self.address)

    def read(self, offset: int = 0, nbytes: int | None = None) -> Bytes:
        data = np.empty(self.nbytes - offset if nbytes is None else nbytes, np.uint8)
        cuda_memory.to_host_later(data.ctypes.data, self.address + offset, data.nbytes, self._stream.handle)
        self._stream.synchronize()
        return data

    def write(self, data: Bytes, offset: int = 0) -> None:
        data = np.ascontiguousarray(data).reshape(-1)
        self._fetched = False
        if self.nbytes > _SMALL:
            cuda_memory.to_device_later(self.address + offset, data.ctypes.data, data.nbytes, self._stream.handle)
            self._stream.synchronize()
            return
        mirror = self._free_mirror()
        mirror.array[offset : offset + data.nbytes] = data
        cuda_memory.to_device_later(self.address + offset, mirror.address + offset, data.nbytes, self._stream.handle)
        self._queued_at = self._stream.waits

    def write_ints(self, values: Sequence[int]) -> None:
        self._fetched = False
        mirror = self._free_mirror()
        if self._ints is None:
            self._ints = mirror.array.data.cast(INTEGERS[self.dtype])
        self._ints[:] = memoryview(array(INTEGERS[self.dtype], values))
        cuda_memory.to_device_later(self.address, mirror.address, self.nbytes, self._stream.handle)
        self._queued_at = self._stream.waits

    def copy_from(self, other: Buffer, offset: int, start: int, nbytes: int) -> None:
        self._fetched = False
        cuda_memory.copy_later(self.address + offset, other.address + start, nbytes, self._stream.handle)

    def contents(self) -> Bytes:
        if not self._fetched and self.nbytes:
            self.fetch_later()
            self._stream.synchronize()
            self.fetched()
        return self._mirrored().array

    # ---- for calls that have the buffer among their results ----

    def fetch_later(self) -> None:
        """Queue the copy to the host."""
        cuda_memory.to_host_later(self._mirrored().address, self.address, self.nbytes, self._stream.handle)

    def fetched(self) -> None:
        """What was queued has arrived."""
        self._fetched = True

    def changed(self) -> None:
        """A call has written the buffer, and what is on the host is not its contents any more."""
        self._fetched = False

    def _free_mirror(self) -> PinnedMemory:
        """The mirror, once no copy reads it any more."""
        if self._queued_at == self._stream.waits:
            self._stream.synchronize()
        return self._mirrored()

    def _mirrored(self) -> PinnedMemory:
        if self._mirror is None:
            self._mirror = PinnedMemory(self.nbytes)
        return self._mirror
