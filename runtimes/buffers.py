"""Device memory that outlives a call: states, caches and tables, bound to graphs by address.

A buffer is raw bytes; graphs see it through a shape and an element type. On the host it is a numpy array, whose untouched pages cost
nothing, so a large cache capacity is free until it is used. On CUDA it is one allocation of ONNX Runtime.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

# Element types by their names in the manifest: bytes per element and the number ONNX gives them.
ELEMENTS: dict[str, tuple[int, int]] = {
    "float": (4, 1),
    "float16": (2, 10),
    "bfloat16": (2, 16),
    "int32": (4, 6),
    "int64": (8, 7),
}
_NUMPY: dict[str, type[np.generic]] = {"float": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}


class Buffer(ABC):
    """Zero-initialised device memory of a fixed shape."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self.nbytes = prod(shape) * ELEMENTS[dtype][0]

    @property
    @abstractmethod
    def address(self) -> int:
        """Where the memory starts, as the backend counts it."""

    @abstractmethod
    def read(self) -> Bytes:
        """A copy of the bytes, on the host."""

    @abstractmethod
    def write(self, data: Bytes) -> None:
        """Replace all bytes."""

    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis, the batch."""
        return self.nbytes // max(1, self.shape[0])

    def row_address(self, index: int) -> int:
        return self.address + index * self.row_bytes()


class HostBuffer(Buffer):
    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        super().__init__(dtype, shape)
        self.bytes = np.zeros(self.nbytes, np.uint8)

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)

    @property
    def array(self) -> npt.NDArray[Any]:
        """The memory as an array of its element type; bf16 as its bits."""
        return self.bytes.view(_NUMPY.get(self.dtype, np.uint16)).reshape(self.shape)

    def read(self) -> Bytes:
        return self.bytes.copy()

    def write(self, data: Bytes) -> None:
        self.bytes[:] = data


class CudaBuffer(Buffer):
    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        from onnxruntime import OrtValue

        super().__init__(dtype, shape)
        self._value = OrtValue.ortvalue_from_shape_and_type([self.nbytes], np.uint8, "cuda", 0)
        self.write(np.zeros(self.nbytes, np.uint8))

    @property
    def address(self) -> int:
        return int(self._value.data_ptr())

    def read(self) -> Bytes:
        return self._value.numpy()  # type: ignore[no-any-return]

    def write(self, data: Bytes) -> None:
        self._value.update_inplace(np.ascontiguousarray(data))


BUFFERS: dict[str, type[Buffer]] = {"cpu": HostBuffer, "cuda": CudaBuffer}


def encode(values: npt.NDArray[np.float32], dtype: str) -> Bytes:
    """fp32 values in the element type `dtype`, as bytes; bf16 is rounded to nearest even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values.astype(_NUMPY[dtype])).view(np.uint8).reshape(-1)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).view(np.uint8).reshape(-1)


def decode(data: Bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The inverse of `encode`, as fp32."""
    if dtype != "bfloat16":
        return data.view(_NUMPY[dtype]).reshape(shape).astype(np.float32, copy=False)
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
