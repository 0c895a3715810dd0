"""Quantized products and embedding on the targets with standard operators.

x W^T is com.microsoft.MatMulNBits over rows of codes. Graphs of target `onnx` have a function of that name, whose body is standard
operators (`nbits_function.py`): for runtimes without the kernel. There activations are rounded to 8 bits, which ONNX Runtime's CPU kernels
for codes of 8 bits need, and those for 4 bits are faster with.

An embedding's rows are gathered as codes and scales, and dequantized. On `onnx` codes of 8 bits are those that MatMulNBits reads, so that
an embedding that is also the LM head is stored once; other rows have codes for DequantizeLinear, whose blocks are standard since opset 21.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import onnx_ir as ir

from qwen_export.errors import ConfigError
from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import LINEAR
from qwen_export.graphs.quantization.packing import QuantFormat
from qwen_export.graphs.quantization.precision_plan import GroupFormat
from qwen_export.graphs.quantization.standard_blocks import BlockCodes, BlockScales, BlockZeros, NBitsCodes, NBitsZeros
from qwen_export.graphs.weights.expression import FirstRows, LastRows, Weight, add_weight, retyped, weight_of
from qwen_export.plugins.emitter import Emitter

_ROUNDED = 4
"""The accuracy level of MatMulNBits with activations of 8 bits."""


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


def nbits_product(
    emit: Emitter, x: ir.Value, name: str, weight: Weight, chosen: GroupFormat, context: PassContext, **attributes: int
) -> ir.Value:
    """x [..,K] times a matrix [N,K], as a product over its codes."""
    (N, K), format = weight.shape, quant_of(chosen)
    inputs = [x, *nbits_parts(emit.graph, name, weight, chosen, context.activation)]
    (y,) = emit(MICROSOFT, "MatMulNBits", inputs, like=x, K=K, N=N, bits=format.bits, block_size=format.block, **attributes)
    return y


def rounded_product(emit: Emitter, x: ir.Value, name: str, weight: Weight, chosen: GroupFormat, context: PassContext) -> ir.Value:
    """The same with activations rounded to 8 bits. The LM head is two products: its first rows, which a draft head reads too, and the rest.
    Graphs share what ONNX Runtime makes of whole matrices only."""
    N, rows = weight.shape[0], context.draft_vocab
    if not (0 < rows < N and x.shape is not None and len(x.shape) == 2):
        return nbits_product(emit, x, name, weight, chosen, context, accuracy_level=_ROUNDED)
    parts = {"first": FirstRows(weight, rows), "last": LastRows(weight, rows)}
    products = [nbits_product(emit, x, f"{name}.{label}", part, chosen, context, accuracy_level=_ROUNDED) for label, part in parts.items()]
    return emit.concat(products, axis=1)


def nbits_parts(graph: ir.Graph, name: str, weight: Weight, chosen: GroupFormat, activation: ir.DataType) -> list[ir.Value]:
    """Codes, scales and, where the format has them, zeros, as MatMulNBits takes them."""
    whole = weight.of if isinstance(weight, FirstRows | LastRows) else weight  # rows at an end are stored where the whole is
    format = quant_of(chosen)

    def part(label: str, kind: type[Weight], *more: object) -> ir.Value:
        made = kind(exact_weight(whole, chosen), format, chosen.method, *more, search=chosen.searcher)  # type: ignore[call-arg]
        return add_weight(graph, f"{name}.nbits_{label}", replace(weight, of=made) if isinstance(weight, FirstRows | LastRows) else made)

    parts = [part("codes", NBitsCodes), part("scales", BlockScales, False, activation)]
    return [*parts, part("zeros", NBitsZeros)] if format.zeros else parts


def quantize_embedding(model: ir.Model, context: PassContext) -> Outcome:
    """Given  Gather(W, ids)        W a matrix that the plan quantizes
    Result DequantizeLinear(Gather(codes, ids), Gather(scales, ids)), or the same in simple operators over the codes of MatMulNBits"""
    if context.quantization is None:
        return Outcome.nothing("nothing is quantized")
    outcome, linear = Outcome(), context.choices[LINEAR].name
    for node in list(model.graph):
        weight = weight_of(node.inputs[0]) if node.op_type == "Gather" and not node.domain else None
        if weight is None or node.inputs[0] is None:
            continue
        chosen = chosen_format(weight, context)
        if chosen is None:
            outcome.skip(node, "the precision plan keeps the embedding as it is stored")
            continue
        name, ids = node.inputs[0].name or "embedding", cast(ir.Value, node.inputs[1])
        emit = Emitter(model.graph, name.removesuffix(".weight"))
        if linear == "turned_product" and quant_of(chosen).bits == 8:
            x = _rows_of_bytes(
                emit, nbits_parts(model.graph, name, weight, chosen, context.activation), ids, weight.shape[1], context.activation
            )
        else:
            parts = quantized_parts(model.graph, name, weight, chosen, context.activation)
            rows = [emit.gather(part, ids, axis=0) for part in parts]
            (x,) = emit("", "DequantizeLinear", rows, like=node.outputs[0], axis=-1, block_size=chosen.block)
        x.shape = node.outputs[0].shape
        replace_node(model.graph, node, emit.nodes, [x])
        outcome.changed += 1
    return outcome


def _rows_of_bytes(emit: Emitter, parts: list[ir.Value], ids: ir.Value, K: int, activation: ir.DataType) -> ir.Value:
    """Rows of codes u8[N,K/block,block] and scales [N,K/block] -> [1,T,K]."""
    codes, scales, *zeros = (emit.gather(part, ids, axis=0) for part in parts)
    apart = emit.ints(-1)

    def per_block(x: ir.Value) -> ir.Value:
        return emit("", "Unsqueeze", [x, apart], like=x)[0]

    middle = per_block(emit.cast(zeros[0], activation)) if zeros else emit.array("nbits_middle", np.array(128, activation.numpy()))
    whole = emit.mul(emit.sub(emit.cast(codes, activation), middle), per_block(scales))
    return emit.reshape(whole, 1, -1, K)


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
