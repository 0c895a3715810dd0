"""SiLU as one node."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext, new_node, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome


def fuse_silu(model: ir.Model, context: PassContext) -> Outcome:
    """Given  y = Mul(x, Sigmoid(x))
    Result y = com.microsoft::QuickGelu(x, alpha=1)"""
    graph, outcome = model.graph, Outcome()
    for node in graph:
        if node.op_type != "Mul" or node.domain:
            continue
        x, gate = node.inputs
        sigmoid = gate.producer() if gate is not None else None
        if sigmoid is None or sigmoid.op_type != "Sigmoid":
            continue
        if sigmoid.inputs[0] is not x:
            outcome.skip(node, "the Sigmoid reads another value: a gate, not SiLU")
            continue
        silu = new_node(MICROSOFT, "QuickGelu", [x], like=x, alpha=1.0)
        replace_node(graph, node, [silu], silu.outputs)
        outcome.changed += 1
    return outcome
