"""The quantized matrices of all experts [E,N,K], for graphs that gather some of them: codes, scales and zeros are separate tensors.

ExpertCodes                  8 bits: i8[E,N,K], with zeros u8[E,N,K]          4 bits: u8[E,N,K/2], code j of a row in the low half of
                             byte j, code j + K/2 in the high half: Gather takes no elements of 4 bits, and so they come apart in order
ExpertScales, ExpertZeros    [E,N,K/block], u8[E,N,K/block]
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.quantization.packing import Array, QuantFormat
from qwen_export.graphs.quantization.quantized_weights import grid_rows
from qwen_export.graphs.quantization.scale_search import NUMPY_SEARCH, ScaleSearch
from qwen_export.graphs.weights.expression import DerivedWeight, TensorSource, Weight


@dataclass(frozen=True)
class _ExpertPart(DerivedWeight):
    """`of` [E,N,K], quantized along K. Memory: one expert at a time."""

    of: Weight
    format: QuantFormat
    method: str
    search: ScaleSearch = field(default=NUMPY_SEARCH, kw_only=True)

    def __post_init__(self) -> None:
        E, N, K = self.of.shape
        object.__setattr__(self, "shape", (E, N, self._width(K)))
        object.__setattr__(self, "dtype", self._dtype())

    def _width(self, K: int) -> int:
        return self.format.blocks(K)

    @abstractmethod
    def _dtype(self) -> ir.DataType: ...

    @abstractmethod
    def _values(self, codes: Array, scales: Array, zeros: Array | None) -> Array:
        """This part of one expert."""

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return np.stack([self._values(*self._grid(source, expert)) for expert in range(start, stop)]).astype(self.dtype.numpy(), copy=False)

    def _grid(self, source: TensorSource, expert: int) -> tuple[Array, Array, Array | None]:
        return grid_rows(_OneExpert(self.of, expert), source, 0, self.shape[1], self.format, self.method, self.search)

    def elements(self, start: int, stop: int) -> int:
        """Those of the experts, which take the memory while the block is made."""
        return self.of.elements(start, stop)

    def spans(self) -> list[tuple[int, int]]:
        return [(e, e + 1) for e in range(self.shape[0])]


@dataclass(frozen=True)
class _OneExpert(DerivedWeight):
    """One of the matrices [E,N,K]."""

    of: Weight
    expert: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.of.shape[1:])
        object.__setattr__(self, "dtype", self.of.dtype)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return self.of.rows(source, self.expert, self.expert + 1)[0, start:stop]


@dataclass(frozen=True)
class ExpertCodes(_ExpertPart):
    """w = scale * (code - zero)."""

    def _width(self, K: int) -> int:
        return K * self.format.bits // 8

    def _dtype(self) -> ir.DataType:
        return ir.DataType.UINT8 if self.format.bits == 4 or self.format.zeros else ir.DataType.INT8

    def _values(self, codes: Array, scales: Array, zeros: Array | None) -> Array:
        if self.format.bits == 4:
            half = codes.shape[1] // 2
            return np.asarray(codes[:, :half] | np.left_shift(codes[:, half:], 4))
        return codes if zeros is not None else codes.astype(np.int16) - self.format.offset


@dataclass(frozen=True)
class ExpertScales(_ExpertPart):
    kind: ir.DataType = ir.DataType.FLOAT

    def _dtype(self) -> ir.DataType:
        return self.kind

    def _values(self, codes: Array, scales: Array, zeros: Array | None) -> Array:
        return scales


@dataclass(frozen=True)
class ExpertZeros(_ExpertPart):
    def _dtype(self) -> ir.DataType:
        return ir.DataType.UINT8

    def _values(self, codes: Array, scales: Array, zeros: Array | None) -> Array:
        if zeros is None:
            raise TypeError("the format has no zeros")
        return zeros
