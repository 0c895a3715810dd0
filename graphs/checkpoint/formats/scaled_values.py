"""FP8 and INT8 weights whose scales cover rectangles: w[o, i] = element[o, i] * scale[o // block_o, i // block_i].

One rectangle may be the whole matrix (per tensor), a row (per channel), a part of a row (per group), or a block, usually 128x128. A third
axis in front counts experts, each with scales of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.logical_tensor import (
    Floats,
    Fp8Rows,
    Grid,
    GridRows,
    LogicalTensor,
    Parts,
    Tensors,
    checked_scales,
    part,
    scales_of,
)
from qwen_export.graphs.checkpoint.formats.storage_format import OTHER_RELEASE, refuse_module
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo
from qwen_export.graphs.e4m3 import E4M3_VALUES

SCALE_TYPES = ("BF16", "F16", "F32", "F8_E8M0", "U8")
ELEMENT_TYPES = ("F8_E4M3", "I8")


@dataclass(frozen=True)
class ScaledTensor(LogicalTensor):
    """`block` is (rows, columns) that share a scale; `counts` how many there are, down and across one matrix."""

    elements: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]
    counts: tuple[int, int]

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def storage(self) -> str:
        kind = "fp8" if self.elements.dtype == "F8_E4M3" else "int8"
        if self.block == self.shape:
            return f"{kind} per tensor"
        return f"{kind} per channel" if self.counts[1] == 1 and self.block[0] == 1 else f"{kind} {self.block[0]}x{self.block[1]}"

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.elements, self.scale

    @property
    def grid(self) -> Grid | None:
        """INT8 with a scale per row, or one in all: a group is a whole row."""
        if self.elements.dtype != "I8" or len(self.shape) != 2 or self.counts[1] != 1 or self.block[0] not in (1, self.shape[0]):
            return None
        return Grid(8, self.shape[1], True, self.scale.dtype)

    def codes(self, parts: Parts, start: int, stop: int) -> GridRows | None:
        if self.grid is None:
            return None
        codes = parts.stored(self.elements, start, stop).view(np.uint8) ^ np.uint8(128)
        scales = checked_scales(self.scale, parts.whole(self.scale)).reshape(-1)
        rows = scales[start:stop] if len(scales) == self.shape[0] else np.full(stop - start, scales[0], np.float32)
        return GridRows(codes, rows[:, None], None, self.shape[1], 8)

    @property
    def fp8_block(self) -> tuple[int, int] | None:
        return self.block if self.elements.dtype == "F8_E4M3" else None

    def fp8_rows(self, parts: Parts, start: int, stop: int) -> Fp8Rows | None:
        if self.fp8_block is None:
            return None
        codes = parts.stored(self.elements, start, stop).view(np.uint8)
        grid = checked_scales(self.scale, parts.whole(self.scale)).reshape(*self.shape[:-2], *self.counts)
        if len(self.shape) == 2:
            return Fp8Rows(codes, grid[np.arange(start, stop) // self.block[0]], self.block[1])
        return Fp8Rows(codes, grid[start:stop, np.arange(self.shape[1]) // self.block[0]], self.block[1])

    def rows(self, parts: Parts, start: int, stop: int) -> Floats:
        raw = parts.stored(self.elements, start, stop)
        values = E4M3_VALUES[raw.view(np.uint8)] if self.elements.dtype == "F8_E4M3" else raw.astype(np.float32)
        scales = checked_scales(self.scale, parts.whole(self.scale))
        if len(self.shape) == 2:
            _scale(values, scales.reshape(self.counts), self.block, start)
        else:
            for matrix, grid in zip(values, scales.reshape(-1, *self.counts)[start:stop], strict=True):
                _scale(matrix, grid, self.block, 0)
        return values


def _scale(values: Floats, grid: npt.NDArray[Any], block: tuple[int, int], start: int) -> None:
    """Multiply rows that begin at row `start` of their matrix by its scales, in place."""
    done = 0
    while done < len(values):
        index, inside = divmod(start + done, block[0])
        count = min(block[0] - inside, len(values) - done)
        values[done : done + count] *= np.repeat(grid[index], block[1])[: values.shape[1]]
        done += count


def scaled_tensor(tensors: Tensors, elements: TensorInfo, scale: str, block: tuple[int, int] | None = None) -> ScaledTensor:
    """The weight made of `elements` and the scales called `scale`. The scales' shape decides what each of them covers: [] or [1] the
    tensor, [O] or [O, 1] a row, [O, G] or [O*G] a group of a row; any other shape must be that of the blocks `block`."""
    name, shape = elements.name, elements.shape
    if elements.dtype not in ELEMENT_TYPES:
        raise refuse_module("fp8 or int8", name, elements.dtype, " or ".join(ELEMENT_TYPES))
    if len(shape) not in (2, 3) or 0 in shape:
        raise CheckpointError("a quantized weight is not a matrix", where=name, got=shape, fix=OTHER_RELEASE)
    given, (rows, columns) = scales_of(tensors, name, scale).shape, shape[-2:]
    if block is not None:
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        if given == (*shape[:-2], *grid) or len(shape) == 3:
            found = part(tensors, name, scale, (*shape[:-2], *grid), SCALE_TYPES)
            return ScaledTensor(name, shape, elements, found, block, grid)
    count = prod(given)
    if len(shape) == 2 and count == 1:
        covered, grid = (rows, columns), (1, 1)
    elif len(shape) == 2 and given in ((rows,), (rows, 1)):
        covered, grid = (1, columns), (rows, 1)
    elif len(shape) == 2 and count % rows == 0 and columns % (count // rows) == 0 and given in ((count,), (rows, count // rows)):
        grid = (rows, count // rows)
        covered = (1, columns // grid[1])
    else:
        wanted = f"one scale, one per row or one per group of a row of {shape}"
        raise CheckpointError(
            "a part of a quantized weight has the wrong shape",
            where=scale,
            got=given,
            expected=wanted + (f", or blocks of {block[0]}x{block[1]}" if block else ""),
            fix="Blocks must be given by weight_block_size in quantization_config of config.json.",
        )
    return ScaledTensor(name, shape, elements, part(tensors, name, scale, given, SCALE_TYPES), covered, grid)
