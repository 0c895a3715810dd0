"""Quantised matrices as DequantizeLinear wants them: codes in the matrix's own shape, and scales beside them.

Blocks lie along K, where the product sums. Scales are positive, as TensorRT demands: blocks for which the search took a negative scale
(its codes then reach one further for positive values) are rounded to nearest instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.quantization.methods import quantize
from qwen_export.graphs.quantization.packing import Array, QuantFormat
from qwen_export.graphs.weights.expression import TensorSource, Weight

_FP8_LARGEST = 448.0


@dataclass(frozen=True)
class BlockCodes(Weight):
    """int4 or int8 [N,K]: w = code * scale of its block."""

    of: Weight
    format: QuantFormat
    method: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.of.shape)
        object.__setattr__(self, "dtype", ir.DataType.INT4 if self.format.bits == 4 else ir.DataType.INT8)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        codes, _ = _quantized(self, source, start, stop)
        if self.format.bits == 8:
            return codes
        pairs = codes.view(np.uint8).reshape(stop - start, -1, 2) & 15
        return pairs[..., 0] | np.left_shift(pairs[..., 1], 4)

    def stored(self) -> Iterator[str]:
        return self.of.stored()


@dataclass(frozen=True)
class BlockScales(Weight):
    """The scales [N, K / block] of `BlockCodes`, in `dtype`."""

    of: Weight
    format: QuantFormat
    method: str
    dtype: ir.DataType

    def __post_init__(self) -> None:
        N, K = self.of.shape
        object.__setattr__(self, "shape", (N, K // self.format.block))

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return _quantized(self, source, start, stop)[1].astype(self.dtype.numpy())

    def elements(self, start: int, stop: int) -> int:
        """Of the matrix: they are what takes memory while the block is made."""
        return (stop - start) * self.of.shape[1]

    def spans(self) -> list[tuple[int, int]]:
        return self.of.spans()

    def stored(self) -> Iterator[str]:
        return self.of.stored()


def _quantized(part: BlockCodes | BlockScales, source: TensorSource, start: int, stop: int) -> tuple[Array, Array]:
    """Signed codes and scales of some rows."""
    values = part.of.rows(source, start, stop).astype(np.float32, copy=False)
    codes, scales, _ = quantize(part.format, values, part.method)
    negative = scales < 0
    if negative.any():
        nearest_codes, nearest_scales, _ = quantize(part.format, values, "rtn")
        codes = np.where(np.repeat(negative, part.format.block, axis=1), nearest_codes, codes)
        scales = np.where(negative, nearest_scales, scales)
    # A block of zeros has no scale; any positive one gives zeros.
    scales = np.where(scales > 0, scales, np.array(1, scales.dtype))
    return (codes.astype(np.int16) - part.format.offset).astype(np.int8), scales


@dataclass(frozen=True)
class Fp8Codes(Weight):
    """FP8 E4M3 [N,K]: w = code * scale of its row."""

    of: Weight

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.of.shape)
        object.__setattr__(self, "dtype", ir.DataType.FLOAT8E4M3FN)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        values = self.of.rows(source, start, stop).astype(np.float32, copy=False)
        return (values / _row_scales(values)[:, None]).astype(self.dtype.numpy())

    def stored(self) -> Iterator[str]:
        return self.of.stored()


@dataclass(frozen=True)
class Fp8Scales(Weight):
    """The scales [N] of `Fp8Codes`."""

    of: Weight
    dtype: ir.DataType

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.of.shape[:1])

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return _row_scales(self.of.rows(source, start, stop).astype(np.float32, copy=False)).astype(self.dtype.numpy())

    def elements(self, start: int, stop: int) -> int:
        """Of the matrix: they are what takes memory while the block is made."""
        return (stop - start) * self.of.shape[1]

    def spans(self) -> list[tuple[int, int]]:
        return self.of.spans()

    def stored(self) -> Iterator[str]:
        return self.of.stored()


def _row_scales(values: Array) -> Array:
    """The largest value becomes the largest code. Rounded as fp16 stores it, so that codes are made for the scale that multiplies them."""
    largest = np.abs(values).max(axis=1) / np.float32(_FP8_LARGEST)
    return np.where(largest > 0, largest, 1).astype(np.float16).clip(np.finfo(np.float16).tiny).astype(np.float32)
