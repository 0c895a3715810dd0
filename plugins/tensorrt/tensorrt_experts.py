"""Routed experts as native layers: the matrices of the chosen experts are gathered, and blocks of rows are multiplied by one each.

Few pairs of token and expert: each pair is a block of one row. Many: pairs are grouped by expert in blocks of b rows, the last
block of an expert filled up; pairs / b + E blocks are always enough, so the sizes are static, every pair is computed and no other expert
is read. Where a pair goes is counted, not sorted: TensorRT's TopK ends at 3840 elements, its cumulative sum does not end.

    rank of a pair = pairs before it with its expert          first block of expert e = blocks of experts before it
    row of a pair  = b * first block + rank                   expert of block j = number of experts whose last block is before j
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwen_export.plugins.emitter import Emitter

_BLOCKS = (8, 16, 32, 64, 128, 256)
# Gathering a matrix (read, written, read again) takes as long as multiplying it by about so many rows: 600 bytes and 4 x 10^5 operations
# of fp16 a nanosecond, as an H100 has.
_ROWS_OF_A_GATHER = 256
_I32, _I64 = ir.DataType.INT32, ir.DataType.INT64


@dataclass(frozen=True)
class ExpertSizes:
    """T tokens of width H, K of E experts for each, with an inner width of I."""

    T: int
    H: int
    E: int
    K: int
    I: int  # noqa: E741  the field's name

    @property
    def pairs(self) -> int:
        return self.T * self.K

    @property
    def block(self) -> int:
        """Rows of a block: 1, or what makes the least of gathering matrices and of multiplying rows that are not there."""
        return min((1, *_BLOCKS), key=lambda b: self._blocks_of(b) * (_ROWS_OF_A_GATHER + b))

    @property
    def blocks(self) -> int:
        return self._blocks_of(self.block)

    def _blocks_of(self, b: int) -> int:
        return self.pairs if b == 1 else -(-self.pairs // b) + min(self.E, self.pairs)


def emit_experts(emit: Emitter, x: ir.Value, logits: ir.Value, gate_up: ir.Value, down: ir.Value, sizes: ExpertSizes) -> ir.Value:
    """x [1,T,H], logits [1,T,E], gate_up [E,2I,H] (gate rows, then up rows), down [E,H,I] -> [1,T,H] of x's dtype."""
    T, K, H = sizes.T, sizes.K, sizes.H
    (p,) = emit("", "Softmax", [emit.reshape(emit.wide(logits), T, sizes.E)], dtype=ir.DataType.FLOAT, axis=-1)
    best, chosen = emit("", "TopK", [p, emit.ints(K)], 2, like=p, axis=-1)
    chosen.type = ir.TensorType(_I64)
    (total,) = emit("", "ReduceSum", [best, emit.ints(-1)], like=best, keepdims=1)
    (weight,) = emit("", "Div", [best, total], like=best)
    rows = emit.reshape(x, T, H)
    expert = emit.reshape(emit.cast(chosen, _I32), sizes.pairs)
    if sizes.block == 1:
        token = emit.array(f"token_of_pair_{T}_{K}", np.repeat(np.arange(T, dtype=np.int32), K))
        y = _multiplied(emit, emit.gather(rows, token, axis=0), expert, gate_up, down, sizes)
    else:
        y = _in_blocks(emit, rows, expert, gate_up, down, sizes)
    scaled = emit.mul(emit.wide(emit.reshape(y, T, K, H)), emit.reshape(weight, T, K, 1))
    (summed,) = emit("", "ReduceSum", [scaled, emit.ints(1)], like=scaled, keepdims=0)
    return emit.cast(emit.reshape(summed, 1, T, H), x.dtype or ir.DataType.FLOAT)


def _in_blocks(emit: Emitter, rows: ir.Value, expert: ir.Value, gate_up: ir.Value, down: ir.Value, sizes: ExpertSizes) -> ir.Value:
    """rows [T,H], expert i32[pairs] -> [pairs,H]."""
    E, b, J = sizes.E, sizes.block, sizes.blocks
    experts = emit.positions(E)
    (same,) = emit("", "Equal", [emit.reshape(expert, sizes.pairs, 1), experts], dtype=ir.DataType.BOOL)
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

    token = emit.array(f"token_of_pair_{sizes.T}_{sizes.K}", np.repeat(np.arange(sizes.T, dtype=np.int32), sizes.K))
    empty = emit.array(f"empty_{J}_{b}", np.zeros(J * b, np.int32))
    where = emit("", "Reshape", [emit.cast(at, _I64), emit.ints(sizes.pairs, 1)], dtype=_I64)[0]
    (source,) = emit("", "ScatterND", [empty, where, token], like=empty)
    number = emit.array(f"block_{J}", np.arange(J, dtype=np.float32)[:, None])
    (passed,) = emit("", "LessOrEqual", [last, number], dtype=ir.DataType.BOOL)
    (owner,) = emit("", "ReduceSum", [emit.wide(passed), emit.ints(-1)], like=mine, keepdims=0)
    (owner,) = emit("", "Min", [owner, emit.scalar(E - 1.0)], like=owner)
    y = _multiplied(emit, emit.gather(rows, source, axis=0), emit.cast(owner, _I32), gate_up, down, sizes)
    return emit.gather(y, at, axis=0)


def _multiplied(emit: Emitter, rows: ir.Value, expert: ir.Value, gate_up: ir.Value, down: ir.Value, sizes: ExpertSizes) -> ir.Value:
    """rows [blocks*b,H], expert i32[blocks] -> [blocks*b,H]: each block through its expert."""
    J, b, H = sizes.blocks, sizes.block, sizes.H
    x = emit.reshape(rows, J, b, H)
    both = emit.matmul(x, emit.transpose(emit.gather(gate_up, expert, axis=0), 0, 2, 1))
    gate, up = emit.split(both, [sizes.I, sizes.I], axis=2)
    inner = emit.mul(emit.mul(gate, emit.sigmoid(gate)), up)
    return emit.reshape(emit.matmul(inner, emit.transpose(emit.gather(down, expert, axis=0), 0, 2, 1)), J * b, H)
