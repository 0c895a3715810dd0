"""Matrix products with weights become `qwen::linear`, which keeps the checkpoint's [out, in] layout until a target chooses one."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.passes.pass_context import PassContext, new_node, replace_node
from qwen_export.graphs.weights.expression import weight_of

LINEAR = "linear"


def recognize_linear(model: ir.Model, context: PassContext) -> int:
    """Given  y = MatMul(x, Transpose(w, perm=[1, 0]))      w an initializer [N,K]
    Result y = qwen::linear(x, w)                          x [..., K] -> y [..., N]"""
    graph, changed = model.graph, 0
    for node in graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        turned = node.inputs[1].producer() if node.inputs[1] is not None else None
        if turned is None or turned.op_type != "Transpose" or weight_of(turned.inputs[0]) is None:
            continue
        linear = new_node(DOMAIN, LINEAR, [node.inputs[0], turned.inputs[0]], like=node.outputs[0])
        linear.outputs[0].shape = node.outputs[0].shape
        replace_node(graph, node, [linear], linear.outputs)
        changed += 1
    return changed


def is_linear(node: ir.Node | None) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type == LINEAR
