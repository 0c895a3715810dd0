"""FP8 matrices in the form of the block FP8 releases: E4M3 codes row after row, and a scale for each block of 128 x 128, the largest
magnitude of its values / 448.

Blocks are those of the stored matrices. A matrix of the graph may be made of several, of parts of one, or of rows in another order; then
fewer rows share a scale, and scales are written for each `shared_rows` of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import onnx_ir as ir

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.logical_tensor import Fp8Rows
from qwen_export.graphs.e4m3 import E4M3_LARGEST, E4M3_VALUES, to_e4m3
from qwen_export.graphs.quantization.packing import Array, Bytes, Floats
from qwen_export.graphs.quantization.precision_plan import FP8_BLOCK
from qwen_export.graphs.weights.expression import (
    BLOCK_BYTES,
    DerivedWeight,
    FirstRows,
    HeadRows,
    LastRows,
    Stacked,
    StackedMatrices,
    StoredWeight,
    TensorSource,
    Weight,
    retyped,
)

_ROW_UNIT, _SCALE_UNIT = 16, 4
_CHUNK = 1 << 15


class Fp8Source(TensorSource, Protocol):
    """Stored tensors, some of them FP8."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""

    def fp8(self, name: str, start: int, stop: int) -> Fp8Rows | None:
        """Rows start..stop-1 as the codes that are stored; None where there are none."""


def block_scales(values: Floats) -> Floats:
    """values f32[N,K] -> the scales f32[N/128, K/128] of its blocks, both rounded up; 1 for a block of zeros."""
    N, K = values.shape
    blocks = -(-K // FP8_BLOCK)
    largest = np.zeros((-(-N // FP8_BLOCK), blocks * FP8_BLOCK), np.float32)
    for index, row in enumerate(largest):
        part = values[index * FP8_BLOCK : (index + 1) * FP8_BLOCK]
        np.maximum(part.max(axis=0), -part.min(axis=0), out=row[:K])
    scales = largest.reshape(len(largest), blocks, FP8_BLOCK).max(axis=2) / np.float32(E4M3_LARGEST)
    return np.where(scales > 0, scales, np.float32(1))


def block_codes(values: Floats, scales: Floats) -> Bytes:
    """The codes u8[N,K] of values for the scales of their blocks."""
    N, K = values.shape
    codes = np.empty((N, K), np.uint8)
    step = max(1, min(FP8_BLOCK, _CHUNK // K))  # so much stays in the processor's cache
    for index, row in enumerate(scales):
        each, first = np.repeat(row, FP8_BLOCK)[:K], index * FP8_BLOCK
        for start in range(first, min(first + FP8_BLOCK, N), step):
            stop = min(start + step, first + FP8_BLOCK)
            codes[start:stop] = to_e4m3(values[start:stop] / each)
    return codes


def block_values(codes: Bytes, scales: Floats) -> Floats:
    """What codes [..., rows, K] stand for, with a scale per row and 128 columns."""
    values: Floats = E4M3_VALUES[codes]
    values *= np.repeat(scales, FP8_BLOCK, axis=-1)[..., : codes.shape[-1]]
    return values


def shared_rows(weight: Weight, of_stored: Callable[[str], int]) -> int:
    """How many neighboring rows of a matrix share a scale wherever they begin at a multiple of that: a power of two up to 128. `of_stored`
    says it of a stored matrix."""
    if isinstance(weight, StoredWeight):
        return of_stored(weight.name)
    if isinstance(weight, StackedMatrices):
        return min(shared_rows(part, of_stored) for part in weight.parts)
    if isinstance(weight, Stacked):
        shared, base = FP8_BLOCK, 0
        for part in weight.parts:
            shared, base = math.gcd(shared, shared_rows(part, of_stored), base), base + part.shape[0]
        return shared
    if isinstance(weight, HeadRows):
        return math.gcd(shared_rows(weight.of, of_stored), weight.group, weight.first, weight.take)
    if isinstance(weight, FirstRows):
        return shared_rows(weight.of, of_stored)
    if isinstance(weight, LastRows):
        return math.gcd(shared_rows(weight.of, of_stored), weight.first)
    return 1


@dataclass(frozen=True)
class _Matrices:
    """Stored matrices as codes with their scales: those of the checkpoint where they are `kept`, else made."""

    source: Fp8Source
    kept: bool

    def codes(self, name: str, start: int, stop: int) -> Bytes:
        if self.kept:
            return self._stored(name, start, stop).codes
        values, skipped = self._blocks(name, start, stop)
        if values.ndim == 3:
            return np.stack([block_codes(matrix, block_scales(matrix)) for matrix in values])
        return block_codes(values, block_scales(values))[skipped : skipped + stop - start]

    def scales(self, name: str, start: int, stop: int) -> Floats:
        """A row of scales for each row of the matrix, [..., rows, K/128]."""
        if self.kept:
            rows = self._stored(name, start, stop)
            blocks = -(-rows.codes.shape[-1] // FP8_BLOCK)
            return np.ascontiguousarray(rows.scales[..., np.arange(blocks) * FP8_BLOCK // rows.columns])
        values, skipped = self._blocks(name, start, stop)
        if values.ndim == 3:
            return np.stack([np.repeat(block_scales(matrix), FP8_BLOCK, axis=0)[: values.shape[1]] for matrix in values])
        return np.repeat(block_scales(values), FP8_BLOCK, axis=0)[skipped : skipped + stop - start]

    def _stored(self, name: str, start: int, stop: int) -> Fp8Rows:
        rows = self.source.fp8(name, start, stop)
        if rows is None:
            raise CheckpointError(
                "a weight has no FP8 codes, although its settings have them",
                where=name,
                fix="Set keep = false for its group in {plan_file}.",
            )
        return rows

    def _blocks(self, name: str, start: int, stop: int) -> tuple[Floats, int]:
        """Whole blocks around some rows, and how many rows come before the first; of a stack of matrices, the matrices."""
        shape = self.source.shape(name)
        if len(shape) == 3:
            return self.source.rows(name, start, stop), 0
        first = start // FP8_BLOCK * FP8_BLOCK
        return self.source.rows(name, first, min(shape[0], -(-stop // FP8_BLOCK) * FP8_BLOCK)), start - first


@dataclass(frozen=True)
class _Codes(_Matrices):
    def rows(self, name: str, start: int, stop: int) -> Array:
        return self.codes(name, start, stop)


@dataclass(frozen=True)
class _Scales(_Matrices):
    def rows(self, name: str, start: int, stop: int) -> Array:
        return self.scales(name, start, stop)


@dataclass(frozen=True)
class Fp8Values(_Matrices):
    """A `TensorSource` of the values that the codes of matrices stand for."""

    def rows(self, name: str, start: int, stop: int) -> Floats:
        return block_values(self.codes(name, start, stop), self.scales(name, start, stop))


@dataclass(frozen=True)
class _Fp8Part(DerivedWeight):
    """Of a matrix [N,K] or the matrices [E,N,K]; `kept`: as the checkpoint stores them. A part is made of whole blocks of 128 rows."""

    of: Weight
    kept: bool

    def _spans(self, rows: int) -> list[tuple[int, int]]:
        """One matrix each, or of one matrix ranges that begin at a block, of which the part has `rows` rows."""
        if len(self.shape) == 3:
            return [(e, e + 1) for e in range(self.shape[0])]
        step = max(1, BLOCK_BYTES // (4 * FP8_BLOCK * self.of.shape[1])) * rows
        return [(start, min(self.shape[0], start + step)) for start in range(0, self.shape[0], step)]


@dataclass(frozen=True)
class Fp8BlockCodes(_Fp8Part):
    """The codes: u8[N, K rounded up to 16] or [E, ...], rows filled up with zeros."""

    def __post_init__(self) -> None:
        K = self.of.shape[-1]
        object.__setattr__(self, "shape", (*self.of.shape[:-1], -(-K // _ROW_UNIT) * _ROW_UNIT))
        object.__setattr__(self, "dtype", ir.DataType.UINT8)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        codes = _as(self.of, self.dtype).rows(cast(TensorSource, _Codes(cast(Fp8Source, source), self.kept)), start, stop)
        return _filled(codes, self.shape[-1])

    def spans(self) -> list[tuple[int, int]]:
        return self._spans(FP8_BLOCK)


@dataclass(frozen=True)
class Fp8BlockScales(_Fp8Part):
    """The scales: f32[N / shared, K / 128 rounded up to 4] or [E, ...], filled up with zeros."""

    shared: int

    def __post_init__(self) -> None:
        N, K = self.of.shape[-2:]
        blocks = -(-K // FP8_BLOCK)
        object.__setattr__(self, "shape", (*self.of.shape[:-2], -(-N // self.shared), -(-blocks // _SCALE_UNIT) * _SCALE_UNIT))
        object.__setattr__(self, "dtype", ir.DataType.FLOAT)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        scales = _Scales(cast(Fp8Source, source), self.kept)
        if len(self.shape) == 2:
            start, stop = start * self.shared, min(self.of.shape[0], stop * self.shared)
        each = _as(self.of, self.dtype).rows(cast(TensorSource, scales), start, stop)
        return _filled(each[..., :: self.shared, :], self.shape[-1])

    def elements(self, start: int, stop: int) -> int:
        """Those of the matrix, which take the memory while the block is made."""
        return self.of.elements(start, stop) * (self.shared if len(self.shape) == 2 else 1)

    def spans(self) -> list[tuple[int, int]]:
        return self._spans(FP8_BLOCK // self.shared)


def _as(weight: Weight, dtype: ir.DataType) -> Weight:
    """The expression over elements of another type: codes or scales in place of values."""
    found = retyped(weight, dtype)
    if found is None:
        raise TypeError(f"{weight.parameter} is computed, and has no codes")
    return found


def _filled(values: Array, width: int) -> Array:
    """Rows with zeros behind them."""
    missing = width - values.shape[-1]
    if missing == 0:
        return np.ascontiguousarray(values)
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
