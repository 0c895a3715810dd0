"""A norm that only products read becomes part of them: every block of the product has the whole row at hand anyway."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.ops.rms_norm_op import rms_norm
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.recognize_linear import is_linear
from qwen_export.plugins.onnxruntime.fuse_residual_norm import offset_weight
from qwen_export.plugins.onnxruntime.native_linear import LINEAR, NORM_INPUT, SWIGLU, is_native, put, with_norm


def absorb_norm(model: ir.Model, context: PassContext) -> int:
    """Given  h = rms_norm(s, w);  y_i = linear(h, W_i) or SwiGlu(h, W_i)           for every reader of h
    Result y_i = qwen.native::Linear(s, W_i, norm=w + offset) or SwiGlu(s, W_i, norm=w + offset)"""
    if context.choices["linear"].name != "native_linear":
        return 0
    graph, changed = model.graph, 0
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type != rms_norm.name:
            continue
        h = node.outputs[0]
        readers = h.consumers()
        if h.is_graph_output() or not all(_takes_norm(reader, h) for reader in readers):
            continue
        weight = offset_weight(graph, node)
        for reader in readers:
            put(graph, reader, with_norm(reader, node.inputs[0], weight, node.attributes.get_float("eps")))
        graph.remove(node, safe=True)
        changed += 1
    return changed


def _takes_norm(node: ir.Node, h: ir.Value) -> bool:
    if node.inputs[0] is not h:
        return False
    return is_linear(node) or (is_native(node, LINEAR, SWIGLU) and len(node.inputs) <= NORM_INPUT[node.op_type])
