"""SiLU as one node."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext, new_node, replace_node


def fuse_silu(model: ir.Model, context: PassContext) -> int:
    """Given  y = Mul(x, Sigmoid(x))
    Result y = com.microsoft::QuickGelu(x, alpha=1)"""
    graph, changed = model.graph, 0
    for node in graph:
        if node.op_type != "Mul" or node.domain:
            continue
        x, gate = node.inputs
        sigmoid = gate.producer() if gate is not None else None
        if sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.inputs[0] is not x:
            continue
        silu = new_node(MICROSOFT, "QuickGelu", [x], like=x, alpha=1.0)
        replace_node(graph, node, [silu], silu.outputs)
        changed += 1
    return changed
