"""Memory of one GPU, in one allocation."""

from __future__ import annotations

import sys
from math import prod

import numpy as np

from qwen_export.runtimes.memory import cuda_memory
from qwen_export.runtimes.memory.buffers import ELEMENTS, Buffer, Bytes
from qwen_export.runtimes.memory.cuda_driver import use_device
from qwen_export.runtimes.memory.cuda_stream import Stream, device_stream


def settle(index: int) -> None:
    """Wait for all that was queued on a device."""
    use_device(index)
    stream = device_stream(index)
    with stream.turn:
        stream.synchronize()


class CudaBuffer(Buffer):
    """`index`: which GPU. Every operation names it to the driver first, since the backend may have chosen another one in between, and is
    queued on the device's stream: behind the calls before it, and in front of those after it. `stream`: another one, for memory that
    only calls beside those have."""

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        index: int = 0,
        whole: CudaBuffer | None = None,
        offset: int = 0,
        stream: Stream | None = None,
    ) -> None:
        super().__init__(dtype, shape)
        self.index = index
        self._whole, self._offset = whole, offset
        use_device(index)
        self._stream = stream or device_stream(index)
        self.address = self._allocate() if whole is None else whole.address + offset
        self._pinned: Bytes | None = None

    def _allocate(self) -> int:
        return cuda_memory.allocate(self.nbytes)

    def __del__(self) -> None:
        if sys.is_finalizing() or getattr(self, "_whole", None) is not None:  # the process, or the whole, gives everything back
            return
        pinned = getattr(self, "_pinned", None)
        if hasattr(self, "address"):
            use_device(self.index)
        if pinned is not None:
            cuda_memory.unpin(pinned.ctypes.data)
        if hasattr(self, "address"):
            cuda_memory.free(self.address)

    def read(self, offset: int = 0, nbytes: int | None = None) -> Bytes:
        data = np.empty(self.nbytes - offset if nbytes is None else nbytes, np.uint8)
        use_device(self.index)
        with self._stream.turn:
            cuda_memory.to_host(data.ctypes.data, self.address + offset, data.nbytes, self._stream.handle)
        return data

    def write(self, data: Bytes, offset: int = 0) -> None:
        data = np.ascontiguousarray(data)
        use_device(self.index)
        with self._stream.turn:
            cuda_memory.to_device(self.address + offset, data.ctypes.data, data.nbytes, self._stream.handle)

    def zero(self, offset: int, nbytes: int) -> None:
        use_device(self.index)
        with self._stream.turn:
            cuda_memory.zero_later(self.address + offset, nbytes, self._stream.handle)

    def copy_from(self, other: Buffer, offset: int, start: int, nbytes: int) -> None:
        use_device(self.index)
        with self._stream.turn:
            if isinstance(other, CudaBuffer) and other.index != self.index:  # the other device's calls have ended
                cuda_memory.copy_between(self.address + offset, self.index, other.address + start, other.index, nbytes, self._stream.handle)
            else:
                cuda_memory.copy_later(self.address + offset, other.address + start, nbytes, self._stream.handle)

    def contents(self) -> Bytes:
        """See Buffer. Logits are read after every call: memory that is pinned once makes that five times as fast."""
        if not self.nbytes:
            return np.zeros(0, np.uint8)
        use_device(self.index)
        if self._pinned is None:
            self._pinned = self._locked()
        with self._stream.turn:
            cuda_memory.to_host(self._pinned.ctypes.data, self.address, self.nbytes, self._stream.handle)
        return self._pinned

    def alike(self, nbytes: int) -> CudaBuffer:
        return CudaBuffer("uint8", (nbytes,), self.index, stream=self._stream)

    def part(self, dtype: str, shape: tuple[int, ...], offset: int = 0) -> CudaBuffer:
        return CudaBuffer(dtype, shape, self.index, self, offset, self._stream)

    def _locked(self) -> Bytes:
        """Pinned memory for the contents; that of the whole, where this is a part."""
        if self._whole is not None:
            if self._whole._pinned is None:
                self._whole._pinned = self._whole._locked()
            return self._whole._pinned[self._offset : self._offset + self.nbytes]
        memory = np.zeros(self.nbytes, np.uint8)
        cuda_memory.pin(memory.ctypes.data, self.nbytes)
        return memory

    def take_rows(self, offset: int, other: CudaBuffer, start: int, pitch: int, width: int, height: int) -> None:
        """To `offset`, one behind the other: `height` rows of `width` bytes of another buffer, which are `pitch` apart from `start` on."""
        use_device(self.index)
        with self._stream.turn:
            for row in range(height):  # a copy in two dimensions takes one allocation, a row may lie in several
                at, where = self.address + offset + row * width, other.address + start + row * pitch
                cuda_memory.copy_later(at, where, width, self._stream.handle)

    def put_rows(self, offset: int, pitch: int, other: CudaBuffer, width: int, height: int) -> None:
        """The inverse: all rows of another buffer, to places `pitch` apart from `offset` on."""
        use_device(self.index)
        with self._stream.turn:
            for row in range(height):
                at, where = self.address + offset + row * pitch, other.address + row * width
                cuda_memory.copy_later(at, where, width, self._stream.handle)

    def grown(self, axis: int, size: int, used: int) -> CudaBuffer:
        """A larger buffer: `axis` has `size` entries, of which the first `used` are copied."""
        larger = CudaBuffer(self.dtype, (*self.shape[:axis], size, *self.shape[axis + 1 :]), self.index)
        entry = prod(self.shape[axis + 1 :]) * ELEMENTS[self.dtype][0]
        if used:
            height = prod(self.shape[:axis])
            settle(self.index)  # what is copied on stream 0 next
            cuda_memory.copy_rows(larger.address, size * entry, self.address, self.shape[axis] * entry, used * entry, height)
        return larger
