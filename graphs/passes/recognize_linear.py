"""Matrix products with weights become `qwen::linear`, which keeps the checkpoint's [out, in] layout until a target chooses one."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.passes.pass_context import PassContext, new_node, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.weights.expression import weight_of

LINEAR = "linear"
_PRODUCTS = ("MatMul", "Gemm")


def recognize_linear(model: ir.Model, context: PassContext) -> Outcome:
    """Given  y = MatMul(x, Transpose(w, perm=[1, 0]))      w an initializer [N,K]
           or  y = Gemm(x, w, transB=1)                     what a trace makes of x [rows, K]
    Result y = qwen::linear(x, w)                          x [..., K] -> y [..., N]"""
    graph, outcome = model.graph, Outcome()
    for node in graph:
        weight = _turned_weight(node)
        if weight is None:
            if not node.domain and node.op_type in _PRODUCTS and any(weight_of(value) is not None for value in node.inputs):
                outcome.skip(node, "its weight is not read as x w^T")
            continue
        linear = new_node(DOMAIN, LINEAR, [node.inputs[0], weight], like=node.outputs[0])
        linear.outputs[0].shape = node.outputs[0].shape
        replace_node(graph, node, [linear], linear.outputs)
        outcome.changed += 1
    return outcome


def _turned_weight(node: ir.Node) -> ir.Value | None:
    """The weight [N,K] of a product x w^T, None where the node is none."""
    value = node.inputs[1] if not node.domain and node.op_type in _PRODUCTS else None
    if value is not None and node.op_type == "MatMul":
        turned = value.producer()
        value = turned.inputs[0] if turned is not None and turned.op_type == "Transpose" else None
    elif value is not None and not (len(node.inputs) == 2 and _plain_gemm(node)):
        return None
    return value if weight_of(value) is not None else None


def _plain_gemm(node: ir.Node) -> bool:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return attributes.get("transB", 0) == 1 and not attributes.get("transA", 0) and attributes.get("alpha", 1.0) == 1.0


def is_linear(node: ir.Node | None) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type == LINEAR
