"""Memory that outlives a call: states, caches, tables and controls, bound to graphs by address.

A buffer is raw bytes; graphs see it through a shape and an element type. On the host it is a numpy array, whose untouched pages cost
nothing, so a large cache capacity is free until it is used. On CUDA it is one allocation, which grows with what is in it.
"""

from __future__ import annotations

import mmap
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qwen_export.runtimes.memory import cuda_memory

Bytes = npt.NDArray[np.uint8]

INTEGERS: dict[str, Literal["i", "q"]] = {"int32": "i", "int64": "q"}
"""Integer element types, as `array` calls them."""

# Element types by their names in the manifest: bytes per element and the number ONNX gives them.
ELEMENTS: dict[str, tuple[int, int]] = {
    "float": (4, 1),
    "float16": (2, 10),
    "bfloat16": (2, 16),
    "int32": (4, 6),
    "int64": (8, 7),
    "uint8": (1, 2),
    "int8": (1, 3),
}
_NUMPY: dict[str, type[np.generic]] = {"float": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}


class Buffer(ABC):
    """Zero-initialized memory of a fixed shape."""

    address: int
    """Where the memory starts, as the backend counts it."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self.nbytes = prod(shape) * ELEMENTS[dtype][0]

    @abstractmethod
    def read(self, offset: int = 0, nbytes: int | None = None) -> Bytes:
        """A copy of some bytes, on the host; all from `offset` when `nbytes` is None."""

    @abstractmethod
    def write(self, data: Bytes, offset: int = 0) -> None:
        """Replace the bytes from `offset` on."""

    def write_ints(self, values: Sequence[int]) -> None:
        """Replace the whole contents, of an integer type."""
        self.write(np.array(values, _NUMPY[self.dtype]).view(np.uint8))

    @abstractmethod
    def copy_from(self, other: Buffer, offset: int, start: int, nbytes: int) -> None:
        """Copy bytes `start`.. of another buffer of the same device to `offset`; the ranges may not overlap."""

    def part(self, dtype: str, shape: tuple[int, ...], offset: int = 0) -> Buffer:
        """The bytes from `offset` on, as a buffer that shares them and keeps them."""
        raise NotImplementedError(type(self).__name__)

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis, the batch."""
        return self.nbytes // max(1, self.shape[0])

    def read_row(self, index: int) -> Bytes:
        return self.read(index * self.row_bytes, self.row_bytes)

    def write_row(self, index: int, data: Bytes) -> None:
        self.write(data, index * self.row_bytes)

    def row_address(self, index: int) -> int:
        return self.address + index * self.row_bytes

    def contents(self) -> Bytes:
        """All bytes on the host; without a copy where they already are, and valid until the next call."""
        return self.read()

    def array(self) -> npt.NDArray[np.float32]:
        """The contents as fp32, likewise."""
        return decode(self.contents(), self.dtype, self.shape)


_MAPPED_FROM, _HUGE_PAGE = 64 << 10, 2 << 20


class HostBuffer(Buffer):
    def __init__(self, dtype: str, shape: tuple[int, ...], whole: HostBuffer | None = None, offset: int = 0) -> None:
        super().__init__(dtype, shape)
        self._map: mmap.mmap | None
        self._bytes: Bytes
        if whole is not None:
            self._map, self._bytes = whole._map, whole._bytes[offset : offset + self.nbytes]
        elif self.nbytes < _MAPPED_FROM or sys.platform == "win32":
            self._map, self._bytes = None, np.zeros(self.nbytes, np.uint8)
        else:  # fresh pages: an allocator may hand out memory that was used before, and has to clear it
            spare = _HUGE_PAGE if self.nbytes >= _HUGE_PAGE else 0
            self._map = mmap.mmap(-1, self.nbytes + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages = np.frombuffer(self._map, np.uint8)
            self._begin = -int(pages.ctypes.data) % _HUGE_PAGE if spare else 0
            self._bytes = pages[self._begin : self._begin + self.nbytes]
        self._memory = self._bytes.data
        self._ints: memoryview[int] | None = None
        self.address = int(self._bytes.ctypes.data)

    def part(self, dtype: str, shape: tuple[int, ...], offset: int = 0) -> HostBuffer:
        return HostBuffer(dtype, shape, self, offset)

    def prefer_huge_pages(self, axis: int, first: int) -> None:
        """From entry `first` of `axis` on. Long caches are read a few per cent faster with huge pages; at the front they would make every
        short text hold 2 MB per head."""
        if self._map is None or self.nbytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        run = prod(self.shape[axis:]) * ELEMENTS[self.dtype][0]
        skipped = run * first // self.shape[axis] // _HUGE_PAGE * _HUGE_PAGE
        for start in range(0, self.nbytes, run):
            if skipped < run and start % _HUGE_PAGE == 0:
                self._map.madvise(mmap.MADV_HUGEPAGE, self._begin + start + skipped, run - skipped)

    def read(self, offset: int = 0, nbytes: int | None = None) -> Bytes:
        return self._bytes[offset : None if nbytes is None else offset + nbytes].copy()

    def write(self, data: Bytes, offset: int = 0) -> None:
        self._bytes[offset : offset + data.nbytes] = data

    def copy_from(self, other: Buffer, offset: int, start: int, nbytes: int) -> None:
        assert isinstance(other, HostBuffer)
        self._memory[offset : offset + nbytes] = other._memory[start : start + nbytes]

    def write_ints(self, values: Sequence[int]) -> None:
        if self._ints is None:
            self._ints = self._memory.cast(INTEGERS[self.dtype])
        if len(values) == 1:
            self._ints[0] = values[0]
        else:
            self._ints[:] = memoryview(array(INTEGERS[self.dtype], values))

    def contents(self) -> Bytes:
        return self._bytes


class CudaBuffer(Buffer):
    def __init__(self, dtype: str, shape: tuple[int, ...], whole: CudaBuffer | None = None, offset: int = 0) -> None:
        super().__init__(dtype, shape)
        self._whole, self._offset = whole, offset
        self.address = cuda_memory.allocate(self.nbytes) if whole is None else whole.address + offset
        self._pinned: Bytes | None = None

    def __del__(self) -> None:
        if sys.is_finalizing() or getattr(self, "_whole", None) is not None:  # the process, or the whole, gives everything back
            return
        pinned = getattr(self, "_pinned", None)
        if pinned is not None:
            cuda_memory.unpin(pinned.ctypes.data)
        if hasattr(self, "address"):
            cuda_memory.free(self.address)

    def read(self, offset: int = 0, nbytes: int | None = None) -> Bytes:
        data = np.empty(self.nbytes - offset if nbytes is None else nbytes, np.uint8)
        cuda_memory.to_host(data.ctypes.data, self.address + offset, data.nbytes)
        return data

    def write(self, data: Bytes, offset: int = 0) -> None:
        data = np.ascontiguousarray(data)
        cuda_memory.to_device(self.address + offset, data.ctypes.data, data.nbytes)

    def copy_from(self, other: Buffer, offset: int, start: int, nbytes: int) -> None:
        cuda_memory.copy_rows(self.address + offset, nbytes, other.address + start, nbytes, nbytes, 1)

    def contents(self) -> Bytes:
        """Read again and again (logits): through memory that is pinned once, five times as fast."""
        if not self.nbytes:
            return np.zeros(0, np.uint8)
        if self._pinned is None:
            self._pinned = self._locked()
        cuda_memory.to_host(self._pinned.ctypes.data, self.address, self.nbytes)
        return self._pinned

    def part(self, dtype: str, shape: tuple[int, ...], offset: int = 0) -> CudaBuffer:
        return CudaBuffer(dtype, shape, self, offset)

    def _locked(self) -> Bytes:
        """Pinned memory for the contents; that of the whole, where this is a part."""
        if self._whole is not None:
            if self._whole._pinned is None:
                self._whole._pinned = self._whole._locked()
            return self._whole._pinned[self._offset : self._offset + self.nbytes]
        memory = np.zeros(self.nbytes, np.uint8)
        cuda_memory.pin(memory.ctypes.data, self.nbytes)
        return memory

    def grown(self, axis: int, size: int, used: int) -> CudaBuffer:
        """A larger buffer: `axis` has `size` entries, of which the first `used` are copied."""
        larger = CudaBuffer(self.dtype, (*self.shape[:axis], size, *self.shape[axis + 1 :]))
        entry = prod(self.shape[axis + 1 :]) * ELEMENTS[self.dtype][0]
        if used:
            height = prod(self.shape[:axis])
            cuda_memory.copy_rows(larger.address, size * entry, self.address, self.shape[axis] * entry, used * entry, height)
        return larger


class DmlBuffer(Buffer):
    """Memory of DirectML's allocator. It has no address that a binding could be given: it is bound as a value of ONNX Runtime, and written
    and read whole."""

    device = "dml"

    def __init__(self, dtype: str, shape: tuple[int, ...], device_id: int = 0) -> None:
        import onnxruntime as ort

        super().__init__(dtype, shape)
        self.address = 0
        self.value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _NUMPY[dtype]), self.device, device_id)

    def read(self, offset: int = 0, nbytes: int | None = None) -> Bytes:
        return as_bytes(self.value.numpy())[offset : None if nbytes is None else offset + nbytes].copy()

    def write(self, data: Bytes, offset: int = 0) -> None:
        if data.nbytes != self.nbytes:
            whole = self.read()
            whole[offset : offset + data.nbytes] = data
            data = whole
        self.value.update_inplace(np.ascontiguousarray(data).view(_NUMPY[self.dtype]).reshape(self.shape))

    def copy_from(self, other: Buffer, offset: int, start: int, nbytes: int) -> None:
        self.write(other.read(start, nbytes), offset)


BUFFERS: dict[str, type[Buffer]] = {"cpu": HostBuffer, "cuda": CudaBuffer, "dml": DmlBuffer}


def encode(values: npt.NDArray[np.float32], dtype: str) -> Bytes:
    """fp32 values in the element type `dtype`, as bytes; bf16 is rounded to nearest even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values.astype(_NUMPY[dtype])).view(np.uint8).reshape(-1)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).view(np.uint8).reshape(-1)


def decode(data: Bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The inverse of `encode`, as fp32; a view where the bytes are fp32 already."""
    if dtype != "bfloat16":
        return data.view(_NUMPY[dtype]).reshape(shape).astype(np.float32, copy=False)
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)


def as_bytes(array: npt.NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
