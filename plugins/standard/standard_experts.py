"""Routed experts in operators of the standard: the matrices of the chosen experts are gathered, quantized ones as codes and scales.

Blocks are taken in rounds, so that what is gathered at a time is bounded whatever the number of experts. A product is W x^T: ONNX
Runtime's CPU products read a left-hand matrix in place, and copy a right-hand one first.

Which token a row of a block belongs to is read from the pairs in the order of their rows, not scattered: DirectML has no ScatterND of
opset 18 or later.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.quantization.expert_blocks import ExpertCodes, ExpertScales, ExpertZeros
from qwen_export.graphs.quantization.packing import QuantFormat
from qwen_export.graphs.quantization.precision_plan import GroupFormat
from qwen_export.graphs.weights.expression import Weight, add_weight, weight_of
from qwen_export.plugins.decompose.decompose_experts import ExpertSizes, Places, emit_experts, routed_experts, token_of_pair
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.rewrite import Replacement
from qwen_export.plugins.standard.standard_quantized import ensure_whole_blocks, exact_weight, quant_of

_ROWS_OF_A_GATHER = 64
"""Measured with ONNX Runtime 1.31 on two cores, fp32 matrices of 1024 x 2048."""
ROUND_BYTES = 128 << 20
"""What the gathered matrices of one kind take at most, as fp32."""
_I32, _U8 = ir.DataType.INT32, ir.DataType.UINT8

Gathered = Callable[[ir.Value, int], ir.Value]
"""expert i32[R], R -> their matrices [R,N,K]."""


def lower_experts(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """moe -> TopK, gathered matrices, batched products."""
    moe = routed_experts(graph, node, context, shared, _ROWS_OF_A_GATHER)
    emit, sizes = moe.emit, moe.sizes
    matrices = _gathered(emit, moe.gate_up, context), _gathered(emit, moe.down, context)

    def multiply(rows: ir.Value, expert: ir.Value) -> ir.Value:
        return _in_rounds(emit, rows, expert, *matrices, sizes)

    def tokens(places: Places, owner: ir.Value) -> ir.Value:
        return _tokens(emit, places, owner, sizes)

    return emit.nodes, [emit_experts(emit, moe.x, moe.logits, sizes, multiply, tokens)]


def rounds(sizes: ExpertSizes) -> list[int]:
    """Blocks of each round."""
    at_once = max(1, ROUND_BYTES // (4 * 2 * sizes.I * sizes.H))
    size = ceil(sizes.blocks / ceil(sizes.blocks / at_once))
    return [min(size, sizes.blocks - start) for start in range(0, sizes.blocks, size)]


def _in_rounds(emit: Emitter, rows: ir.Value, expert: ir.Value, gate_up: Gathered, down: Gathered, sizes: ExpertSizes) -> ir.Value:
    """rows [blocks*b,H], expert i32[blocks] -> [blocks*b,H]."""
    J, b, H, taken = sizes.blocks, sizes.block, sizes.H, rounds(sizes)
    turned = emit.reshape(rows, J, H, 1) if b == 1 else emit.transpose(emit.reshape(rows, J, b, H), 0, 2, 1)
    whole = len(taken) == 1
    columns = [turned] if whole else emit.split(turned, taken, axis=0)
    experts = [expert] if whole else emit.split(expert, taken, axis=0)
    made = []
    for x, chosen, count in zip(columns, experts, taken, strict=True):
        gate, up = emit.split(emit.matmul(gate_up(chosen, count), x), [sizes.I, sizes.I], axis=1)
        made.append(emit.matmul(down(chosen, count), emit.mul(emit.mul(gate, emit.sigmoid(gate)), up)))
    y = made[0] if whole else emit.concat(made, axis=0)
    return emit.reshape(y if b == 1 else emit.transpose(y, 0, 2, 1), J * b, H)


def _tokens(emit: Emitter, places: Places, owner: ir.Value, sizes: ExpertSizes) -> ir.Value:
    """The pairs in the order of their rows have no gaps; row r of the blocks is pair r - (rows before its expert) + (pairs before it)."""
    J, b, pairs = sizes.blocks, sizes.block, sizes.pairs
    _, order = emit("", "TopK", [emit.wide(places.at), emit.ints(pairs)], 2, like=places.count, axis=-1, largest=0)
    order.type = ir.TensorType(ir.DataType.INT64)
    ordered = emit.gather(token_of_pair(emit, sizes), emit.cast(order, _I32), axis=0)
    zero = emit.array("axis_0", np.array(0, np.int64))
    (before,) = emit("", "CumSum", [places.count, zero], like=places.count, exclusive=1)
    shift = emit.reshape(emit.gather(emit.sub(before, places.first), owner, axis=0), J, 1)
    rows = emit.array(f"rows_{J}_{b}", np.arange(J * b, dtype=np.float32).reshape(J, b))
    (pair,) = emit("", "Min", [emit.add(rows, shift), emit.scalar(pairs - 1.0)], like=rows)
    return emit.gather(ordered, emit.cast(emit.reshape(pair, J * b), _I32), axis=0)


def _gathered(emit: Emitter, value: ir.Value, context: PassContext) -> Gathered:
    """How some of the matrices `value` [E,N,K] are read, as the precision plan says."""
    weight = weight_of(value)
    if weight is None:
        raise TypeError("the experts have no stored weight")
    chosen = context.format_of(weight)
    if chosen.quant is None:
        return lambda expert, count: emit.gather(value, expert, axis=0)
    ensure_whole_blocks(weight, chosen, value.name or "", even_rows=False)
    parts = _parts(emit.graph, value.name or "experts", weight, chosen, context.activation)
    N, blocks = weight.shape[1], chosen.quant.blocks(weight.shape[2])

    def gathered(expert: ir.Value, count: int) -> ir.Value:
        codes, *others = [emit.gather(part, expert, axis=0) for part in parts]
        if quant_of(chosen).bits == 4:
            codes = _halves_in_order(emit, codes)
            if len(others) == 1:
                others.append(_middle(emit, quant_of(chosen), count, N, blocks))
        return emit("", "DequantizeLinear", [codes, *others], dtype=context.activation, axis=2, block_size=chosen.block)[0]

    return gathered


def _parts(graph: ir.Graph, name: str, weight: Weight, chosen: GroupFormat, activation: ir.DataType) -> list[ir.Value]:
    """Codes, scales and, where the format has them, zeros of all experts."""
    of, format, search = exact_weight(weight, chosen), quant_of(chosen), chosen.searcher
    made: dict[str, Weight] = {
        "codes": ExpertCodes(of, format, chosen.method, search=search),
        "scales": ExpertScales(of, format, chosen.method, activation, search=search),
    }
    if format.zeros:
        made["zeros"] = ExpertZeros(of, format, chosen.method, search=search)
    return [add_weight(graph, f"{name}.{label}", part) for label, part in made.items()]


def _halves_in_order(emit: Emitter, codes: ir.Value) -> ir.Value:
    """Bytes [R,N,K/2] of two codes -> codes u8[R,N,K]."""
    (low,) = emit("", "BitwiseAnd", [codes, emit.array("low_half", np.array(15, np.uint8))], like=codes)
    (high,) = emit("", "BitShift", [codes, emit.array("half_a_byte", np.array(4, np.uint8))], like=codes, direction="RIGHT")
    return emit.concat([low, high], axis=2)


def _middle(emit: Emitter, format: QuantFormat, *shape: int) -> ir.Value:
    """The zeros of a format that has none, whose codes are unsigned here."""

    def make() -> ir.Value:
        (zeros,) = emit("", "Expand", [emit.array("middle_of_codes", np.array([format.offset], np.uint8)), emit.ints(*shape)], dtype=_U8)
        zeros.shape = ir.Shape(shape)
        return zeros

    return emit.shared("middle_" + "_".join(map(str, shape)), make)
