"""Quantized products and embedding on the targets with standard operators.

onnx       x W^T -> MatMul(x, DequantizeLinear(codes [K,N], scales, axis=0)); blocks of codes are standard since opset 21. On the CPU
           ONNX Runtime makes one product over the codes of it where it may prepack (runtimes.model.load lets it).
directml   com.microsoft.MatMulNBits over rows of codes
both       an embedding's rows are gathered as codes and scales, and dequantized
"""

from __future__ import annotations

from typing import cast

import onnx_ir as ir

from qwen_export.errors import ConfigError
from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.quantization.packing import QuantFormat
from qwen_export.graphs.quantization.precision_plan import GroupFormat
from qwen_export.graphs.quantization.standard_blocks import BlockCodes, BlockScales, BlockZeros, NBitsCodes, NBitsZeros
from qwen_export.graphs.weights.expression import FirstRows, Weight, add_weight, retyped, weight_of
from qwen_export.plugins.emitter import Emitter


def chosen_format(weight: Weight, context: PassContext) -> GroupFormat | None:
    """How the plan quantizes a matrix, None where it does not. Raises ConfigError where the operators cannot have it."""
    if len(weight.shape) != 2:
        return None
    chosen = context.format_of(weight)
    if chosen.quant is None:
        return None
    ensure_whole_blocks(weight, chosen, next(weight.stored()), even_rows=False)
    return chosen


def ensure_whole_blocks(weight: Weight, chosen: GroupFormat, where: str, *, even_rows: bool = True) -> None:
    """Raise ConfigError where a matrix [N,K], or matrices [E,N,K], are not made of the whole blocks, and with `even_rows` of the whole
    bytes, that DequantizeLinear reads."""
    N, K = weight.shape[-2:]
    if K % chosen.block or (even_rows and N % 2):
        raise ConfigError(
            "a quantized matrix is not made of whole blocks",
            where=where,
            got=f"{N} rows of {K} values in blocks of {chosen.block}",
            expected="rows of whole blocks" + (", and an even number of them" if even_rows else ""),
            fix='Give it another block in {plan_file}, or format = "stored".',
        )


def dequantized_product(emit: Emitter, x: ir.Value, name: str, weight: Weight, chosen: GroupFormat, context: PassContext) -> ir.Value:
    """x [..,K] times a matrix [N,K], as the product of x and its dequantized codes."""
    codes = quantized_parts(emit.graph, f"{name}.turned", weight, chosen, context.activation, turned=True)
    (w,) = emit("", "DequantizeLinear", codes, like=x, axis=0, block_size=chosen.block)
    return emit.matmul(x, w)


def nbits_product(emit: Emitter, x: ir.Value, name: str, weight: Weight, chosen: GroupFormat, context: PassContext) -> ir.Value:
    """The same as one node of ONNX Runtime."""
    N, K = weight.shape
    whole = weight.of if isinstance(weight, FirstRows) else weight  # rows at the front are stored where the whole is
    format, graph = quant_of(chosen), emit.graph

    def part(label: str, kind: type[Weight], *more: object) -> ir.Value:
        made = kind(exact_weight(whole, chosen), format, chosen.method, *more, search=chosen.searcher)  # type: ignore[call-arg]
        return add_weight(graph, f"{name}.nbits_{label}", made if whole is weight else FirstRows(made, N))

    inputs = [x, part("codes", NBitsCodes), part("scales", BlockScales, False, context.activation)]
    if format.zeros:
        inputs.append(part("zeros", NBitsZeros))
    (y,) = emit(MICROSOFT, "MatMulNBits", inputs, like=x, K=K, N=N, bits=format.bits, block_size=format.block)
    return y


def quantize_embedding(model: ir.Model, context: PassContext) -> Outcome:
    """Given  Gather(W, ids)        W a matrix that the plan quantizes
    Result DequantizeLinear(Gather(codes, ids), Gather(scales, ids))"""
    if context.quantization is None:
        return Outcome.nothing("nothing is quantized")
    outcome = Outcome()
    for node in list(model.graph):
        weight = weight_of(node.inputs[0]) if node.op_type == "Gather" and not node.domain else None
        if weight is None or node.inputs[0] is None:
            continue
        chosen = chosen_format(weight, context)
        if chosen is None:
            outcome.skip(node, "the precision plan keeps the embedding as it is stored")
            continue
        emit = Emitter(model.graph, (node.inputs[0].name or "embedding").removesuffix(".weight"))
        parts = quantized_parts(model.graph, node.inputs[0].name or "embedding", weight, chosen, context.activation)
        rows = [emit.gather(part, cast(ir.Value, node.inputs[1]), axis=0) for part in parts]
        (x,) = emit("", "DequantizeLinear", rows, like=node.outputs[0], axis=-1, block_size=chosen.block)
        x.shape = node.outputs[0].shape
        replace_node(model.graph, node, emit.nodes, [x])
        outcome.changed += 1
    return outcome


def quantized_parts(
    graph: ir.Graph, name: str, weight: Weight, chosen: GroupFormat, activation: ir.DataType, *, turned: bool = False
) -> list[ir.Value]:
    """Codes, scales and, where the format has them, zeros, as DequantizeLinear takes them; turned: of the matrix [K,N]."""
    of, format = exact_weight(weight, chosen), quant_of(chosen)
    parts: dict[str, Weight] = {
        "codes": BlockCodes(of, format, chosen.method, turned, search=chosen.searcher),
        "scales": BlockScales(of, format, chosen.method, turned, activation, search=chosen.searcher),
    }
    if format.zeros:
        parts["zeros"] = BlockZeros(of, format, chosen.method, turned, search=chosen.searcher)
    return [add_weight(graph, f"{name}.{label}", part) for label, part in parts.items()]


def quant_of(chosen: GroupFormat) -> QuantFormat:
    """The blocks of a format that quantizes."""
    if chosen.quant is None:
        raise TypeError("the matrix is not quantized")
    return chosen.quant


def exact_weight(weight: Weight, chosen: GroupFormat) -> Weight:
    """Integers of a checkpoint and their scales are exact in fp32, and not in every other type."""
    return cast(Weight, retyped(weight, ir.DataType.FLOAT)) if chosen.given else weight
