"""Memory that outlives a call: states, caches, tables and controls.

A buffer is raw bytes; graphs see it through a shape and an element type. There is one kind per device: `host_buffer.py`, `cuda_buffer.py`,
`directml_buffer.py` and, on a stream of its own, `stream_buffer.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

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
    "float8e4m3fn": (1, 17),
}
NUMPY: dict[str, type[np.generic]] = {"float": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}


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

    def zero(self, offset: int, nbytes: int) -> None:
        """Make these bytes zero; on a GPU that is queued, as copies within the device are."""
        self.write(np.zeros(nbytes, np.uint8), offset)

    def release(self, offset: int, nbytes: int) -> None:  # noqa: B027 - most memory cannot be given back in part
        """These bytes are not needed: where the device can, their memory is free until they are written again. They then hold anything."""

    def write_ints(self, values: Sequence[int]) -> None:
        """Replace the whole contents, of an integer type."""
        self.write(np.array(values, NUMPY[self.dtype]).view(np.uint8))

    @abstractmethod
    def copy_from(self, other: Buffer, offset: int, start: int, nbytes: int) -> None:
        """Copy bytes `start`.. of another buffer, of the same kind of device, to `offset`; the ranges may not overlap."""

    def alike(self, nbytes: int) -> Buffer:
        """Zeroed memory of so many bytes on the same device."""
        raise NotImplementedError(type(self).__name__)

    def on(self, kind: str, index: int) -> Buffer:
        """The memory that a graph on this device is bound to: another than this where there is a copy on each of several devices."""
        return self

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

    def rows(self, first: int, count: int) -> Buffer:
        """Entries `first` .. `first + count - 1` of the first axis, as a buffer that shares their memory."""
        return self.part(self.dtype, (count, *self.shape[1:]), first * self.row_bytes)

    def contents(self) -> Bytes:
        """All bytes on the host; without a copy where they already are, and valid until the next call."""
        return self.read()

    def array(self) -> npt.NDArray[np.float32]:
        """The contents as fp32, likewise."""
        return decode(self.contents(), self.dtype, self.shape)


def encode(values: npt.NDArray[np.float32], dtype: str) -> Bytes:
    """fp32 values in the element type `dtype`, as bytes; bf16 is rounded to nearest even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values.astype(NUMPY[dtype])).view(np.uint8).reshape(-1)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).view(np.uint8).reshape(-1)


def decode(data: Bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The inverse of `encode`, as fp32; a view where the bytes are fp32 already."""
    if dtype != "bfloat16":
        return data.view(NUMPY[dtype]).reshape(shape).astype(np.float32, copy=False)
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)


def as_bytes(array: npt.NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
