"""Quantised matrices as weight expressions: made and packed while the bundle is written, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.quantization.methods import quantize
from qwen_export.graphs.quantization.packing import PANEL_ROWS, Array, QuantFormat, pack
from qwen_export.graphs.weights.expression import BLOCK_BYTES, TensorSource, Weight


@dataclass(frozen=True)
class Quantized(Weight):
    """A matrix [N,K] quantised and packed: u8[panels, bytes of a panel], whose rows are panels of 16 rows of the matrix."""

    of: Weight
    format: QuantFormat
    method: str

    def __post_init__(self) -> None:
        N, K = self.of.shape
        object.__setattr__(self, "shape", self.format.packed_shape(N, K))
        object.__setattr__(self, "dtype", ir.DataType.UINT8)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        values = self.of.rows(source, start * PANEL_ROWS, min(self.of.shape[0], stop * PANEL_ROWS)).astype(np.float32, copy=False)
        return pack(self.format, *quantize(self.format, values, self.method))

    def elements(self, start: int, stop: int) -> int:
        """Of the matrix: they are what takes memory while the block is made."""
        return (stop - start) * PANEL_ROWS * self.of.shape[1]

    def spans(self) -> list[tuple[int, int]]:
        step = max(1, BLOCK_BYTES // (4 * self.elements(0, 1)))
        return [(start, min(self.shape[0], start + step)) for start in range(0, self.shape[0], step)]

    def stored(self) -> Iterator[str]:
        return self.of.stored()


@dataclass(frozen=True)
class QuantizedMatrices(Weight):
    """The matrices of all experts [E,N,K], each quantised and packed: u8[E, panels, bytes of a panel]. Memory: one expert at a time."""

    of: Weight
    format: QuantFormat
    method: str

    def __post_init__(self) -> None:
        E, N, K = self.of.shape
        object.__setattr__(self, "shape", (E, *self.format.packed_shape(N, K)))
        object.__setattr__(self, "dtype", ir.DataType.UINT8)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        experts = self.of.rows(source, start, stop).astype(np.float32, copy=False)
        return np.stack([pack(self.format, *quantize(self.format, expert, self.method)) for expert in experts])

    def elements(self, start: int, stop: int) -> int:
        """Of the experts: they are what takes memory while the block is made."""
        return self.of.elements(start, stop)

    def spans(self) -> list[tuple[int, int]]:
        return [(e, e + 1) for e in range(self.shape[0])]

    def stored(self) -> Iterator[str]:
        return self.of.stored()
