"""Quantized matrices as weight expressions: made and packed while the bundle is written, a few rows at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
import onnx_ir as ir

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.logical_tensor import GridRows
from qwen_export.graphs.quantization.packing import PANEL_ROWS, Array, Bytes, Floats, QuantFormat, pack
from qwen_export.graphs.quantization.precision_plan import GPTQ, KEPT, GroupFormat
from qwen_export.graphs.quantization.scale_search import NUMPY_SEARCH, ScaleSearch, quantize
from qwen_export.graphs.weights.expression import BLOCK_BYTES, DerivedWeight, TensorSource, Weight, retyped


class GridSource(TensorSource, Protocol):
    """Stored tensors, some of them on integer grids."""

    def codes(self, name: str, start: int, stop: int) -> GridRows | None:
        """Rows start..stop-1 on the tensor's own grid; None where it has none."""


def packed_weight(of: Weight, chosen: GroupFormat) -> Weight:
    """The matrix [N,K], or the matrices [E,N,K], in the chosen format: quantized, or with the codes of the checkpoint."""
    if chosen.quant is None:
        raise TypeError("the weight is not quantized")
    if chosen.given:  # integers of 8 bits and all scales are exact in fp32, and not in every other type
        of = cast(Weight, retyped(of, ir.DataType.FLOAT))
    return (Quantized if len(of.shape) == 2 else QuantizedMatrices)(of, chosen.quant, chosen.method, search=chosen.searcher)


def grid_rows(
    of: Weight, source: TensorSource, start: int, stop: int, format: QuantFormat, method: str, search: ScaleSearch
) -> tuple[Bytes, Array, Bytes | None]:
    """Codes, scales and zeros of rows start..stop-1 of a matrix, as `quantize` gives them: computed, or those of the checkpoint."""
    if method in (KEPT, GPTQ):
        return _stored_grid(of, source, start, stop, format)
    return quantize(format, of.rows(source, start, stop).astype(np.float32, copy=False), method, search)


def _stored_grid(of: Weight, source: TensorSource, start: int, stop: int, format: QuantFormat) -> tuple[Bytes, Array, Bytes | None]:
    """Codes, scales and zeros of rows of `of` as the source has them. The expression has which rows of which tensors: it is evaluated
    over rows of codes, scales and zeros side by side."""
    K = of.shape[-1]
    blocks = format.blocks(K)
    sides = of.rows(_Grids(cast(GridSource, source), format), start, stop)
    codes, scales = sides[..., :K].astype(np.uint8), sides[..., K : K + blocks].astype(format.scale_dtype)
    return codes, scales, sides[..., K + blocks :].astype(np.uint8) if format.zeros else None


@dataclass(frozen=True)
class _Grids:
    """A `TensorSource` whose rows are codes [K], scales [blocks] and, where the format has them, zeros [blocks]."""

    source: GridSource
    format: QuantFormat

    def rows(self, name: str, start: int, stop: int) -> Floats:
        codes = self.source.codes(name, start, stop)
        if codes is None:
            raise CheckpointError(
                "a weight has no grid along its rows, although its settings have one",
                where=name,
                fix="Set keep = false for its group in {plan_file}.",
            )
        K = codes.codes.shape[-1]
        group = np.arange(self.format.blocks(K)) * self.format.block // codes.group
        sides = [codes.codes.astype(np.float32), codes.scales[..., group]]
        if self.format.zeros:
            middle = np.full(codes.scales.shape, self.format.offset, np.uint8)
            sides.append((middle if codes.zeros is None else codes.zeros)[..., group].astype(np.float32))
        return np.concatenate(sides, axis=-1)


@dataclass(frozen=True)
class Quantized(DerivedWeight):
    """A matrix [N,K] quantized and packed: u8[panels, bytes of a panel], whose rows are panels of 16 rows of the matrix. With the `method`
    "kept" codes, scales and zeros are those that the checkpoint stores."""

    of: Weight
    format: QuantFormat
    method: str
    search: ScaleSearch = field(default=NUMPY_SEARCH, kw_only=True)

    def __post_init__(self) -> None:
        N, K = self.of.shape
        object.__setattr__(self, "shape", self.format.packed_shape(N, K))
        object.__setattr__(self, "dtype", ir.DataType.UINT8)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        first, last = start * PANEL_ROWS, min(self.of.shape[0], stop * PANEL_ROWS)
        return pack(self.format, *grid_rows(self.of, source, first, last, self.format, self.method, self.search))

    def elements(self, start: int, stop: int) -> int:
        """Those of the matrix, which take the memory while the block is made."""
        return (stop - start) * PANEL_ROWS * self.of.shape[1]

    def spans(self) -> list[tuple[int, int]]:
        step = max(1, BLOCK_BYTES // (4 * self.elements(0, 1)))
        return [(start, min(self.shape[0], start + step)) for start in range(0, self.shape[0], step)]


@dataclass(frozen=True)
class QuantizedMatrices(DerivedWeight):
    """The matrices of all experts [E,N,K], each quantized and packed: u8[E, panels, bytes of a panel]. Memory: one expert at a time."""

    of: Weight
    format: QuantFormat
    method: str
    search: ScaleSearch = field(default=NUMPY_SEARCH, kw_only=True)

    def __post_init__(self) -> None:
        E, N, K = self.of.shape
        object.__setattr__(self, "shape", (E, *self.format.packed_shape(N, K)))
        object.__setattr__(self, "dtype", ir.DataType.UINT8)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        if self.method in (KEPT, GPTQ):
            codes, scales, zeros = _stored_grid(self.of, source, start, stop, self.format)
            return np.stack([pack(self.format, codes[e], scales[e], None if zeros is None else zeros[e]) for e in range(stop - start)])
        experts = self.of.rows(source, start, stop).astype(np.float32, copy=False)
        return np.stack([pack(self.format, *quantize(self.format, expert, self.method, self.search)) for expert in experts])

    def elements(self, start: int, stop: int) -> int:
        """Those of the experts, which take the memory while the block is made."""
        return self.of.elements(start, stop)

    def spans(self) -> list[tuple[int, int]]:
        return [(e, e + 1) for e in range(self.shape[0])]
