"""A norm that only products read becomes part of them: every block of the product has the whole row at hand anyway."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.ops.rms_norm_op import rms_norm
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import is_linear
from qwen_export.plugins.onnxruntime.linear_plugin import LINEAR, NORM_INPUT, SWIGLU, is_native, put, with_norm
from qwen_export.plugins.rewrite import offset_weight


def absorb_norm(model: ir.Model, context: PassContext) -> Outcome:
    """Given  h = rms_norm(s, w);  y_i = linear(h, W_i) or SwiGlu(h, W_i)           for every reader of h
    Result y_i = qwen.native::Linear(s, W_i, norm=w + offset) or SwiGlu(s, W_i, norm=w + offset)"""
    if context.choices["linear"].name != "native_linear":
        return Outcome.nothing(f"products are lowered to {context.choices['linear'].name}, which takes no norm")
    graph, outcome = model.graph, Outcome()
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type != rms_norm.name:
            continue
        h = node.outputs[0]
        readers = h.consumers()
        others = [reader for reader in readers if not _takes_norm(reader, h)]
        if h.is_graph_output() or others:
            outcome.skip(node, "it is a graph output" if h.is_graph_output() else f"{others[0].op_type} reads it, and takes no norm")
            continue
        weight = offset_weight(graph, node)
        for reader in readers:
            put(graph, reader, with_norm(reader, node.inputs[0], weight, node.attributes.get_float("eps")))
        graph.remove(node, safe=True)
        outcome.changed += 1
    return outcome


def _takes_norm(node: ir.Node, h: ir.Value) -> bool:
    if node.inputs[0] is not h:
        return False
    return is_linear(node) or (is_native(node, LINEAR, SWIGLU) and len(node.inputs) <= NORM_INPUT[node.op_type])
