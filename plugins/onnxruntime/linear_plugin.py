"""qwen::linear on our own kernels: a few rows are bound by reading the weight once, more rows are a blocked product."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext, new_node, replace_node
from qwen_export.graphs.passes.recognize_linear import LINEAR as LINEAR_OP
from qwen_export.graphs.passes.recognize_linear import is_linear
from qwen_export.graphs.weights.expression import weight_of
from qwen_export.plugins.emitter import Shared
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.onnxruntime.linear_builtin import lower_linear_builtin
from qwen_export.plugins.rewrite import Replacement

LINEAR, SWIGLU = "Linear", "SwiGlu"
# Where each op takes the norm of its input.
NORM_INPUT = {LINEAR: 3, SWIGLU: 2}
_RESIDUAL_INPUT = 2


def lower_linear_plugin(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::linear(x, w) -> qwen.native::Linear(x, w), or FusedMatMul(x, w, transB=1) where it does not take the width of the result, or
    of x: towers have widths of their own"""
    weight = weight_of(node.inputs[1])
    if weight is not None and any(width % context.choices[LINEAR_OP].columns for width in weight.shape):
        return lower_linear_builtin(graph, node, context, shared)
    product = new_node(NATIVE, LINEAR, list(node.inputs), like=node.outputs[0], epsilon=0.0)
    return [product], list(product.outputs)


def is_native(node: ir.Node | None, *ops: str) -> bool:
    return node is not None and node.domain == NATIVE and node.op_type in ops


def with_norm(node: ir.Node, x: ir.Value | None, weight: ir.Value, eps: float) -> ir.Node:
    """The native form of a product that reads x and normalizes it itself."""
    op = LINEAR if is_linear(node) else node.op_type
    inputs: list[ir.Value | None] = [x, *node.inputs[1:]]
    inputs += [None] * (NORM_INPUT[op] - len(inputs))
    return new_node(NATIVE, op, [*inputs, weight], like=node.outputs[0], epsilon=eps)


def with_residual(node: ir.Node, residual: ir.Value) -> ir.Node:
    """The native form of a product that adds `residual` to its result."""
    inputs = list(node.inputs)
    inputs[_RESIDUAL_INPUT : _RESIDUAL_INPUT + 1] = [residual]
    eps = 0.0 if is_linear(node) else node.attributes.get_float("epsilon")
    return new_node(NATIVE, LINEAR, inputs, like=node.outputs[0], epsilon=eps)


def put(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Replace `old` by `new`, which gets the shape of its result."""
    new.outputs[0].shape = old.outputs[0].shape
    replace_node(graph, old, [new], new.outputs)
