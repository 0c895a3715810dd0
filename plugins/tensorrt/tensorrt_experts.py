"""Routed experts as native layers: the matrices of the chosen experts are gathered, and blocks of rows are multiplied by one each."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_export.plugins.decompose import decompose_experts as decompose
from qwen_export.plugins.emitter import Emitter

ROWS_OF_A_GATHER = 256
"""A gathered matrix is read, written and read again: 600 bytes and 4 x 10^5 operations of fp16 a nanosecond, as an H100 has."""
_I32, _I64 = ir.DataType.INT32, ir.DataType.INT64


def emit_experts(emit: Emitter, x: ir.Value, logits: ir.Value, gate_up: ir.Value, down: ir.Value, sizes: decompose.ExpertSizes) -> ir.Value:
    """x [1,T,H], logits [1,T,E], gate_up [E,2I,H] (gate rows, then up rows), down [E,H,I] -> [1,T,H] of x's dtype."""

    def multiply(rows: ir.Value, expert: ir.Value) -> ir.Value:
        J, b, H = sizes.blocks, sizes.block, sizes.H
        x = emit.reshape(rows, J, b, H)
        both = emit.matmul(x, emit.transpose(emit.gather(gate_up, expert, axis=0), 0, 2, 1))
        gate, up = emit.split(both, [sizes.I, sizes.I], axis=2)
        inner = emit.mul(emit.mul(gate, emit.sigmoid(gate)), up)
        return emit.reshape(emit.matmul(inner, emit.transpose(emit.gather(down, expert, axis=0), 0, 2, 1)), J * b, H)

    def tokens(places: decompose.Places, owner: ir.Value) -> ir.Value:
        J, b = sizes.blocks, sizes.block
        empty = emit.array(f"empty_{J}_{b}", np.zeros(J * b, np.int32))
        (where,) = emit("", "Reshape", [emit.cast(places.at, _I64), emit.ints(sizes.pairs, 1)], dtype=_I64)
        return emit("", "ScatterND", [empty, where, decompose.token_of_pair(emit, sizes)], like=empty)[0]

    return decompose.emit_experts(emit, x, logits, sizes, multiply, tokens)
