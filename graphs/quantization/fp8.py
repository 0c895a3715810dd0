"""FP8 matrices: codes in E4M3, and a scale per row beside them, in the form of DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwen_export.graphs.weights.expression import Array, DerivedWeight, TensorSource, Weight

_FP8_LARGEST = 448.0


@dataclass(frozen=True)
class Fp8Codes(DerivedWeight):
    """FP8 E4M3 [N,K]: w = code * scale of its row."""

    of: Weight

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.of.shape)
        object.__setattr__(self, "dtype", ir.DataType.FLOAT8E4M3FN)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        values = self.of.rows(source, start, stop).astype(np.float32, copy=False)
        scaled: Array = (values / _row_scales(values)[:, None]).astype(self.dtype.numpy())
        return scaled


@dataclass(frozen=True)
class Fp8Scales(DerivedWeight):
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


def rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The values that the codes of a matrix [N,K] stand for."""
    scales = _row_scales(values)[:, None]
    codes = (values / scales).astype(ir.DataType.FLOAT8E4M3FN.numpy())
    return np.asarray(codes.astype(np.float32) * scales, np.float32)


def _row_scales(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The largest value becomes the largest code. Rounded as fp16 stores it, so that codes are made for the scale that multiplies them."""
    largest = np.abs(values).max(axis=1) / np.float32(_FP8_LARGEST)
    return np.where(largest > 0, largest, 1).astype(np.float16).clip(np.finfo(np.float16).tiny).astype(np.float32)
