"""qwen::linear on com.microsoft's FusedMatMul."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext, new_node
from qwen_export.plugins.emitter import Shared
from qwen_export.plugins.rewrite import Replacement


def lower_linear_builtin(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::linear(x, w) -> FusedMatMul(x, w, transB=1): the weight keeps the checkpoint's layout."""
    product = new_node(MICROSOFT, "FusedMatMul", list(node.inputs), like=node.outputs[0], transB=1)
    return [product], list(product.outputs)
