"""Matrices of a BF16 checkpoint stay BF16 under fp32 activations, where our products read them: exact, and half the bytes."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext, new_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.weights.expression import Weight, WeightTensor, retyped, weight_of
from qwen_export.plugins.onnxruntime.experts_plugin import MOE, WEIGHT_INPUTS
from qwen_export.plugins.onnxruntime.linear_plugin import LINEAR, SWIGLU, is_native


def keep_stored_bf16(model: ir.Model, context: PassContext) -> Outcome:
    """Given  qwen.native::Linear(x, w), SwiGlu(x, w), Moe(x, l, w, w'), Gather(w, ids)
           w an fp32 initializer whose every element is stored as BF16
    Result the same over w in bf16; Gather followed by a Cast to fp32       where nothing else reads w"""
    if context.precision != "fp32":
        return Outcome.nothing("weights are converted to the activations' type")
    if context.choices["linear"].name != "native_linear":
        return Outcome.nothing(f"products are lowered to {context.choices['linear'].name}, which reads fp32 weights")
    graph, outcome = model.graph, Outcome()
    for value in list(graph.initializers.values()):
        weight, readers = weight_of(value), value.consumers()
        if weight is None or weight.dtype != ir.DataType.FLOAT or not _stored_bf16(weight, context):
            continue
        products = [node for node in readers if is_native(node, LINEAR, SWIGLU) and _reads_only_as(node, value, 1)]
        products += [node for node in readers if is_native(node, MOE) and any(_reads_only_as(node, value, i) for i in WEIGHT_INPUTS)]
        gathers = [node for node in readers if node.op_type == "Gather" and not node.domain and _reads_only_as(node, value, 0)]
        narrow = retyped(weight, ir.DataType.BFLOAT16)
        if narrow is None or len(products) + len(gathers) != len(readers) or value.is_graph_output():
            other = next((node for node in readers if node not in products and node not in gathers), None)
            if other is not None:
                outcome.skip(other, f"it takes no bf16, so {value.name} is widened")
            continue
        value.const_value, value.type = WeightTensor(narrow, value.name or ""), ir.TensorType(narrow.dtype)
        for node in gathers:
            _widen(graph, node.outputs[0])
        outcome.changed += 1
    return outcome


def _stored_bf16(weight: Weight, context: PassContext) -> bool:
    names = list(weight.stored())
    return bool(names) and all(context.stored.get(name) == "BF16" for name in names)


def _reads_only_as(node: ir.Node, value: ir.Value, index: int) -> bool:
    return [i for i, given in enumerate(node.inputs) if given is value] == [index]


def _widen(graph: ir.Graph, rows: ir.Value) -> None:
    """`rows` become bf16, with their readers behind a Cast."""
    node = rows.producer()
    if node is None:
        raise TypeError("gathered rows have no producer")
    cast = new_node("", "Cast", [rows], dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    wide = cast.outputs[0]
    wide.shape, rows.type = rows.shape, ir.TensorType(ir.DataType.BFLOAT16)
    rows.replace_all_uses_with(wide)
    cast.replace_input_with(0, rows)
    graph.insert_after(node, cast)
