"""Quantized matrices for operators of the ONNX standard and com.microsoft.MatMulNBits: codes, scales and zeros are separate tensors.

    BlockCodes, BlockScales, BlockZeros   [N,K], [N,K/block], [N,K/block]; turned: [K,N], [K/block,N], [K/block,N]   (DequantizeLinear)
    NBitsCodes, NBitsZeros                u8[N, K/block, block * bits / 8], u8[N, K/block * bits / 8]                (MatMulNBits)

Without zeros codes are signed. Elements of 4 bits are stored two in a byte, the first one in the low half.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.quantization.packing import Array, QuantFormat
from qwen_export.graphs.quantization.quantized_weights import grid_rows
from qwen_export.graphs.quantization.scale_search import NUMPY_SEARCH, ScaleSearch
from qwen_export.graphs.weights.expression import BLOCK_BYTES, DerivedWeight, TensorSource, Weight


@dataclass(frozen=True)
class _Part(DerivedWeight):
    """`of` [N,K], quantized. A `turned` part is computed whole: its memory is the part and a few rows of the matrix."""

    of: Weight
    format: QuantFormat
    method: str
    turned: bool = False
    search: ScaleSearch = field(default=NUMPY_SEARCH, kw_only=True)

    def __post_init__(self) -> None:
        N, K = self.of.shape
        width = self._width(K)
        object.__setattr__(self, "shape", (width, N) if self.turned else (N, width))
        object.__setattr__(self, "dtype", self._dtype())

    @abstractmethod
    def _width(self, K: int) -> int: ...

    @abstractmethod
    def _dtype(self) -> ir.DataType: ...

    @abstractmethod
    def _values(self, codes: Array, scales: Array, zeros: Array | None) -> Array:
        """This part of some rows, an element each."""

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        if not self.turned:
            return self._packed(self._some(source, start, stop))
        N, pairs = self.of.shape[0], self.dtype.bitwidth == 4 and self.of.shape[0] % 2 == 0
        made = np.empty((stop - start, N // 2 if pairs else N), np.uint8 if self.dtype.bitwidth == 4 else self.dtype.numpy())
        step = max(2, BLOCK_BYTES // (4 * self.of.shape[1]) // 2 * 2)
        for first in range(0, N, step):
            last = min(N, first + step)
            values = self._some(source, first, last).T[start:stop]
            if pairs:
                made[:, first // 2 : last // 2] = self._packed(values)
            else:
                made[:, first:last] = values.astype(made.dtype, copy=False)
        return made if pairs or self.dtype.bitwidth != 4 else self._packed(made)

    def _some(self, source: TensorSource, start: int, stop: int) -> Array:
        return self._values(*grid_rows(self.of, source, start, stop, self.format, self.method, self.search))

    def _packed(self, values: Array) -> Array:
        """Elements as they are stored. Those of 4 bits fill bytes across the ends of rows, as ONNX packs them."""
        if self.dtype.bitwidth != 4:
            return np.ascontiguousarray(values.astype(self.dtype.numpy(), copy=False))
        flat = np.ascontiguousarray(values).astype(np.uint8).reshape(-1) & 15
        if len(flat) % 2:
            flat = np.append(flat, np.uint8(0))
        packed = flat[::2] | np.left_shift(flat[1::2], 4)
        return np.asarray(packed.reshape(len(values), -1) if values.shape[1] % 2 == 0 else packed)

    def elements(self, start: int, stop: int) -> int:
        """Those of the matrix, which take the memory while the block is made."""
        return (stop - start) * (self.of.shape[0] if self.turned else self.of.shape[1])

    def spans(self) -> list[tuple[int, int]]:
        """One span where a part of the rows would not fill whole bytes."""
        odd = self.dtype.bitwidth == 4 and self.shape[-1] % 2
        return [(0, self.shape[0])] if self.turned or odd else self.of.spans()


@dataclass(frozen=True)
class BlockCodes(_Part):
    """w = scale * (code - zero)."""

    def _width(self, K: int) -> int:
        return K

    def _dtype(self) -> ir.DataType:
        return _codes_dtype(self.format)

    def _values(self, codes: Array, scales: Array, zeros: Array | None) -> Array:
        return codes if zeros is not None else (codes.astype(np.int16) - self.format.offset).astype(np.int8)


@dataclass(frozen=True)
class BlockScales(_Part):
    kind: ir.DataType = ir.DataType.FLOAT

    def _width(self, K: int) -> int:
        return self.format.blocks(K)

    def _dtype(self) -> ir.DataType:
        return self.kind

    def _values(self, codes: Array, scales: Array, zeros: Array | None) -> Array:
        return scales


@dataclass(frozen=True)
class BlockZeros(_Part):
    def _width(self, K: int) -> int:
        return self.format.blocks(K)

    def _dtype(self) -> ir.DataType:
        return _codes_dtype(self.format)

    def _values(self, codes: Array, scales: Array, zeros: Array | None) -> Array:
        if zeros is None:
            raise TypeError("the format has no zeros")
        return zeros


@dataclass(frozen=True)
class NBitsCodes(_Part):
    def __post_init__(self) -> None:
        N, K = self.of.shape
        object.__setattr__(self, "shape", (N, self.format.blocks(K), self.format.block * self.format.bits // 8))
        object.__setattr__(self, "dtype", ir.DataType.UINT8)

    def _width(self, K: int) -> int:
        return K

    def _dtype(self) -> ir.DataType:
        return ir.DataType.UINT8

    def _values(self, codes: Array, scales: Array, zeros: Array | None) -> Array:
        return _bytes(codes, self.format.bits).reshape(len(codes), *self.shape[1:])


@dataclass(frozen=True)
class NBitsZeros(_Part):
    def _width(self, K: int) -> int:
        return -(-self.format.blocks(K) * self.format.bits // 8)

    def _dtype(self) -> ir.DataType:
        return ir.DataType.UINT8

    def _values(self, codes: Array, scales: Array, zeros: Array | None) -> Array:
        if zeros is None:
            raise TypeError("the format has no zeros")
        return _bytes(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))) if self.format.bits == 4 else zeros, self.format.bits)


def _bytes(codes: Array, bits: int) -> Array:
    """Unsigned codes [N,even] of 4 bits, two to a byte; of 8 bits as they are."""
    if bits == 8:
        return codes
    pairs = codes.reshape(len(codes), -1, 2).astype(np.uint8)
    return np.asarray(pairs[..., 0] | np.left_shift(pairs[..., 1], 4))


def _codes_dtype(format: QuantFormat) -> ir.DataType:
    if format.bits == 4:
        return ir.DataType.UINT4 if format.zeros else ir.DataType.INT4
    return ir.DataType.UINT8 if format.zeros else ir.DataType.INT8
