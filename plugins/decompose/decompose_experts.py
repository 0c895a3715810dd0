"""Routed experts in standard nodes: each pair of token and expert gets a row of a block, and each block one expert's matrices.

Few pairs: each pair is a block of one row. Many: pairs are grouped by expert in blocks of b rows, the last block of an expert filled
up; pairs / b + E blocks are always enough, so the sizes are static, every pair is computed and no other expert is read. Where a pair
goes is counted, not sorted: TensorRT's TopK ends at 3840 elements, its cumulative sum does not end.

    rank of a pair = pairs before it with its expert          first block of expert e = blocks of experts before it
    row of a pair  = b * first block + rank                   expert of block j = number of experts whose last block is before j
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.plugins.emitter import Emitter, Shared, static_shape

_BLOCKS = (8, 16, 32, 64, 128, 256)
_I32, _I64 = ir.DataType.INT32, ir.DataType.INT64


@dataclass(frozen=True)
class ExpertSizes:
    """T tokens of width H, K of E experts for each, with an inner width of I. Gathering a matrix takes as long as multiplying it by
    `rows_of_a_gather` rows."""

    T: int
    H: int
    E: int
    K: int
    I: int  # noqa: E741  the field's name
    rows_of_a_gather: int

    @property
    def pairs(self) -> int:
        return self.T * self.K

    @property
    def block(self) -> int:
        """Rows of a block: 1, or what makes the least of gathering matrices and of multiplying rows that are not there."""
        return min((1, *_BLOCKS), key=lambda b: self._blocks_of(b) * (self.rows_of_a_gather + b))

    @property
    def blocks(self) -> int:
        return self._blocks_of(self.block)

    def _blocks_of(self, b: int) -> int:
        return self.pairs if b == 1 else -(-self.pairs // b) + min(self.E, self.pairs)


@dataclass(frozen=True)
class RoutedExperts:
    """A node `moe`: x [T,H], the router's logits [T,E], gate_up [E,2I,H] and down [E,H,I], with where its nodes are emitted."""

    emit: Emitter
    x: ir.Value
    logits: ir.Value
    gate_up: ir.Value
    down: ir.Value
    sizes: ExpertSizes


def routed_experts(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared, rows_of_a_gather: int) -> RoutedExperts:
    """What all targets that lower `moe` to standard nodes begin with."""
    x, logits, gate_up, down = node.inputs
    if x is None or logits is None or gate_up is None or down is None:
        raise TypeError("moe has an input that is missing")
    emit = Emitter(graph, (gate_up.name or "experts").removesuffix(".gate_up_proj"), shared)
    E, H, width = static_shape(down)
    sizes = ExpertSizes(context.static.T, H, E, node.attributes.get_int("top_k"), width, rows_of_a_gather)
    return RoutedExperts(emit, x, logits, gate_up, down, sizes)


@dataclass(frozen=True)
class Places:
    """Where the pairs are in blocks: `at` i32[pairs], the row of each. Of each expert, fp32[E]: `count`, its pairs; `first`, its first row;
    `last`, the number of blocks up to its end."""

    at: ir.Value
    count: ir.Value
    first: ir.Value
    last: ir.Value


Multiply = Callable[[ir.Value, ir.Value], ir.Value]
"""rows [blocks*b,H], expert i32[blocks] -> [blocks*b,H]: each block through its expert."""

Tokens = Callable[[Places, ir.Value], ir.Value]
"""Of the places of pairs, and the expert i32[blocks] of each block, the token i32[blocks*b] of each row. Rows that fill blocks up may have
any."""


def emit_experts(emit: Emitter, x: ir.Value, logits: ir.Value, sizes: ExpertSizes, multiply: Multiply, tokens: Tokens) -> ir.Value:
    """x [1,T,H], logits [1,T,E] -> [1,T,H] of x's dtype."""
    T, K, H = sizes.T, sizes.K, sizes.H
    (p,) = emit("", "Softmax", [emit.reshape(emit.wide(logits), T, sizes.E)], dtype=ir.DataType.FLOAT, axis=-1)
    best, chosen = emit("", "TopK", [p, emit.ints(K)], 2, like=p, axis=-1)
    chosen.type = ir.TensorType(_I64)
    (total,) = emit("", "ReduceSum", [best, emit.ints(-1)], like=best, keepdims=1)
    (weight,) = emit("", "Div", [best, total], like=best)
    rows = emit.reshape(x, T, H)
    expert = emit.reshape(emit.cast(chosen, _I32), sizes.pairs)
    if sizes.block == 1:
        y = multiply(emit.gather(rows, token_of_pair(emit, sizes), axis=0), expert)
    else:
        places = _places(emit, expert, sizes)
        owner = _owner(emit, places.last, sizes)
        y = multiply(emit.gather(rows, tokens(places, owner), axis=0), owner)
        y = emit.gather(y, places.at, axis=0)
    scaled = emit.mul(emit.wide(emit.reshape(y, T, K, H)), emit.reshape(weight, T, K, 1))
    (summed,) = emit("", "ReduceSum", [scaled, emit.ints(1)], like=scaled, keepdims=0)
    return emit.cast(emit.reshape(summed, 1, T, H), x.dtype or ir.DataType.FLOAT)


def token_of_pair(emit: Emitter, sizes: ExpertSizes) -> ir.Value:
    """i32[pairs]."""
    return emit.array(f"token_of_pair_{sizes.T}_{sizes.K}", np.repeat(np.arange(sizes.T, dtype=np.int32), sizes.K))


def _places(emit: Emitter, expert: ir.Value, sizes: ExpertSizes) -> Places:
    """expert i32[pairs]."""
    b = sizes.block
    (same,) = emit("", "Equal", [emit.reshape(expert, sizes.pairs, 1), emit.positions(sizes.E)], dtype=ir.DataType.BOOL)
    # fp32 counts are exact up to 2^24.
    mine = emit.wide(same)
    zero, one = emit.array("axis_0", np.array(0, np.int64)), emit.scalar(1.0)
    (seen,) = emit("", "CumSum", [mine, zero], like=mine)
    (rank,) = emit("", "ReduceSum", [emit.mul(mine, seen), emit.ints(-1)], like=mine, keepdims=0)
    (count,) = emit("", "ReduceSum", [mine, emit.ints(0)], like=mine, keepdims=0)
    (used,) = emit("", "Floor", [emit.mul(emit.add(count, emit.scalar(b - 1.0)), emit.scalar(1.0 / b))], like=count)
    (last,) = emit("", "CumSum", [used, zero], like=used)
    first = emit.mul(emit.sub(last, used), emit.scalar(float(b)))
    at = emit.cast(emit.sub(emit.add(emit.gather(first, expert, axis=0), rank), one), _I32)
    return Places(at, count, first, last)


def _owner(emit: Emitter, last: ir.Value, sizes: ExpertSizes) -> ir.Value:
    """The expert of each block, i32[blocks]; blocks that no expert needs get the last one."""
    number = emit.array(f"block_{sizes.blocks}", np.arange(sizes.blocks, dtype=np.float32)[:, None])
    (passed,) = emit("", "LessOrEqual", [last, number], dtype=ir.DataType.BOOL)
    (owner,) = emit("", "ReduceSum", [emit.wide(passed), emit.ints(-1)], like=last, keepdims=0)
    (owner,) = emit("", "Min", [owner, emit.scalar(sizes.E - 1.0)], like=owner)
    return emit.cast(owner, _I32)
