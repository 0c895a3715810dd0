"""A graph for calls of one size: no dynamic dim is left, and what such calls never use leaves the signature."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.models.state import PENDING
from qwen_export.graphs.passes.context import PassContext
from qwen_export.graphs.passes.fold_transaction import fold_transaction
from qwen_export.plugins.ops.gated_delta_net import gated_delta_net
from qwen_export.plugins.ops.schema import DOMAIN

_COUNTS = ("length", "accepted", "commit")


def fix_sizes(model: ir.Model, context: PassContext) -> int:
    """Given  a captured graph with dims B T S N P
    Result the same with B = 1 and the sizes of the context; counts are i32. Without pending tokens (P = 0) their inputs and `accepted`
           are gone; where calls are never padded, `commit` too. With N = T the logits are those of all tokens, in order."""
    sizes, graph = context.static, model.graph
    known = {"B": 1, "T": sizes.T, "S": sizes.S, "N": sizes.N, "P": sizes.P}
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([known.get(d.value or "", d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape])
        if value.name in _COUNTS:
            value.type = ir.TensorType(ir.DataType.INT32)
    if not sizes.P and not sizes.padded:
        fold_transaction(model, context)
    elif not sizes.P:
        _nothing_pending(graph)
    if sizes.N == sizes.T:
        _all_rows(graph)
    return len(known)


def _nothing_pending(graph: ir.Graph) -> None:
    gone = (*PENDING, "accepted")
    for node in graph:
        if node.domain == DOMAIN and node.op_type == gated_delta_net.name:
            for name in gone:
                node.replace_input_with(gated_delta_net.inputs.index(name), None)
    for values in (graph.inputs, graph.outputs):
        for value in list(values):
            key = (value.name or "").removesuffix(".next").rsplit(".", 1)[-1]
            if key in gone:
                values.remove(value)
                value.name = (value.name or "").removesuffix(".next").replace(".pending_", ".")


def _all_rows(graph: ir.Graph) -> None:
    """The head reads `hidden` itself instead of its rows 0 .. T-1."""
    rows = next(value for value in graph.inputs if value.name == "logit_rows")
    for node in list(graph):
        if node.op_type == "Gather" and not node.domain and _comes_from(node.inputs[1], rows) and node.inputs[0] is not None:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
    graph.inputs.remove(rows)
    for node in reversed(list(graph)):  # the views of logit_rows, and the Gather
        if _comes_from(node.outputs[0], rows) or (node.op_type == "Gather" and not node.outputs[0].uses()):
            graph.remove(node, safe=True)


def _comes_from(value: ir.Value | None, origin: ir.Value) -> bool:
    while value is not None and value is not origin:
        node = value.producer()
        value = node.inputs[0] if node is not None and node.inputs else None
    return value is origin
