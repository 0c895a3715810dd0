"""Weights that a checkpoint stores as codes that the kernels can read unchanged: the same codes, zeros and scales, packed without loss.

Integers are kept where the plan quantizes to as many bits or more, the inputs are in order, and groups are whole blocks: groups of
32, 64, 128 or a multiple, whose scale then stands for several blocks. FP8 codes are kept where the plan has fp8 and scales are those of
whole blocks of 128 columns: of blocks of 128x128, rows or whole matrices. Gate and up of a feed-forward block, and the experts of a layer,
are one matrix for the kernels: they are kept where all of them have one grid. All else is dequantized and quantized as the plan says.
Imports neither torch nor onnx.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.formats.logical_tensor import Grid, LogicalTensor
from qwen_export.graphs.checkpoint.tensor_names import stored_name
from qwen_export.graphs.quantization.packing import BLOCKS
from qwen_export.graphs.quantization.precision_plan import (
    FORMATS,
    FP8,
    FP8_BLOCK,
    INT4,
    INT8,
    KEPT,
    GroupFormat,
    PrecisionPlan,
    group_of,
    parameter_of,
)

_NAMES = {FORMATS[name]: name for name in (INT4, INT8)}
_HALVES = re.compile(r"\.(gate|up)_proj\.weight$")


def keep_stored(plan: PrecisionPlan, checkpoint: Checkpoint, names: Sequence[str]) -> PrecisionPlan:
    """The plan, with what it keeps of the matrices `names` (in the names of the modules), and what becomes of all that are quantized."""
    weights = {name: checkpoint.weights[stored_name(checkpoint.config, name)] for name in names}
    found = {name: _kept(plan.of(name), weight) for name, weight in weights.items() if weight.quantized}
    together = defaultdict(list)
    for name in names:
        together[_matrix(name)].append(name)
    for members in together.values():
        if len({found.get(name, "") for name in members}) > 1:
            found |= {name: "beside others of another grid" for name in members if isinstance(found.get(name), GroupFormat)}
    outcome: dict[str, dict[str, int]] = {}
    for name, chosen in found.items():
        counts, line = outcome.setdefault(group_of(name), {}), _outcome_line(plan.of(name), weights[name], chosen)
        counts[line] = counts.get(line, 0) + 1
    return replace(plan, kept={name: chosen for name, chosen in found.items() if isinstance(chosen, GroupFormat)}, outcome=outcome)


def _kept(planned: GroupFormat, weight: LogicalTensor) -> GroupFormat | str:
    """The format on the checkpoint's grid, or why it is not kept."""
    grid = weight.grid
    if not planned.quantized:
        return "the plan quantizes nothing here"
    if not planned.keep:
        return "the plan has keep = false"
    if planned.quant is None:
        return _kept_fp8(planned, weight)
    if grid is None:
        return "no integers in order along its rows"
    if grid.bits > planned.quant.bits:
        return "more bits than the plan's"
    block = block_of(grid, weight.shape[-1])
    if block is None:
        return f"groups of {grid.group}"
    return GroupFormat(_NAMES[grid.bits], block, KEPT, not grid.symmetric, wide_scales=grid.scales != "F16")


def _kept_fp8(planned: GroupFormat, weight: LogicalTensor) -> GroupFormat | str:
    if weight.fp8_block is None:
        return "no FP8 codes"
    if planned.block != FP8_BLOCK:
        return "this target has a scale per row"
    (rows, columns), (N, K) = weight.fp8_block, weight.shape[-2:]
    if columns % FP8_BLOCK and columns < K:
        return f"blocks of {rows}x{columns}"
    return GroupFormat(FP8, FP8_BLOCK, KEPT, scale_rows=FP8_BLOCK if rows >= N else math.gcd(rows, FP8_BLOCK))


def block_of(grid: Grid, columns: int) -> int | None:
    """The largest block of the kernels that is inside one group wherever it begins, and of those that fill a row one that does; None where
    there is none."""
    whole_row = grid.group >= columns
    inside = [block for block in reversed(BLOCKS) if whole_row or grid.group % block == 0]
    return next((block for block in inside if columns % block == 0), inside[0] if inside else None)


def _matrix(name: str) -> str:
    """One name for all stored matrices that a kernel reads as one."""
    return _HALVES.sub(".gate_up_proj.weight", parameter_of(name))


def _outcome_line(planned: GroupFormat, weight: LogicalTensor, chosen: GroupFormat | str) -> str:
    stored = re.sub(r" g(\d+)$", r" group \1", weight.storage)
    if isinstance(chosen, GroupFormat):
        return f"{KEPT}: {stored}{' zeros' if chosen.zeros else ''}"
    return f"{stored}, dequantized{f' to {planned}' if planned.quantized else ''} ({chosen})"
