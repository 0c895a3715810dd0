"""Quantised matrices as weight expressions: made and packed while the bundle is written, a few rows at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.quantization.methods import quantize
from qwen_export.graphs.quantization.packing import PANEL_ROWS, Array, Bytes, Floats, QuantFormat, dequantize, pack
from qwen_export.graphs.weights.expression import TensorSource, Weight

# Values that one task quantises.
_TASK = 1 << 20


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
        return self._made(self._read(source, start, stop))

    def blocks(self, source: TensorSource) -> Iterator[Array]:
        """Reading stays in the caller's thread; a few blocks are quantised beside it at a time."""
        workers = max(1, os.cpu_count() or 1)
        step = max(1, _TASK // (PANEL_ROWS * self.of.shape[1]))
        waiting: deque[Future[Bytes]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, self.shape[0], step):
                values = self._read(source, start, min(self.shape[0], start + step))
                waiting.append(pool.submit(self._made, values))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def dequantized(self, source: TensorSource) -> Iterator[Floats]:
        """The matrix that the codes stand for, in blocks of rows: what a run multiplies with."""
        N, K = self.of.shape
        step = max(1, _TASK // K)
        for start in range(0, N, step):
            values = self.of.rows(source, start, min(N, start + step)).astype(np.float32)
            yield dequantize(self.format, *quantize(self.format, values, self.method))

    def stored(self) -> Iterator[str]:
        return self.of.stored()

    def _read(self, source: TensorSource, start: int, stop: int) -> Floats:
        return self.of.rows(source, start * PANEL_ROWS, min(self.of.shape[0], stop * PANEL_ROWS)).astype(np.float32, copy=False)

    def _made(self, values: Floats) -> Bytes:
        return pack(self.format, *quantize(self.format, values, self.method))


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
        return np.stack([self._made(source, e) for e in range(start, stop)])

    def dequantized(self, source: TensorSource) -> Iterator[Floats]:
        """The experts that the codes stand for, one [1,N,K] after the other: what a run multiplies with."""
        for e in range(self.shape[0]):
            yield dequantize(self.format, *quantize(self.format, self._read(source, e), self.method))[None]

    def stored(self) -> Iterator[str]:
        return self.of.stored()

    def _read(self, source: TensorSource, expert: int) -> Floats:
        return self.of.rows(source, expert, expert + 1)[0].astype(np.float32, copy=False)

    def _made(self, source: TensorSource, expert: int) -> Bytes:
        return pack(self.format, *quantize(self.format, self._read(source, expert), self.method))
