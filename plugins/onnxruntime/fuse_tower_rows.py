"""What stands between the products of a tower's block as one node each: every one of them reads and writes all patches."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext, new_node, sole_user
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.onnxruntime.linear_plugin import put
from qwen_export.plugins.onnxruntime.picture_attention_plugin import with_bias

_MOST_COLUMNS = 4096


def fuse_tower_rows(model: ir.Model, context: PassContext) -> Outcome:
    """Given  s = Add(r, Add(x, b));  y = LayerNormalization(s, w, o)      b stored, all of one shape
    Result s, y = qwen.native::ResidualNorm(x, b, r, w, o)

    Given  y = Gelu(Add(x, b)), the form with tanh
    Result y = qwen.native::BiasGelu(x, b)"""
    if context.choices["picture_attention"].name != "native_tower":
        return Outcome.nothing("the tower is lowered to kernels of ONNX Runtime")
    graph, outcome = model.graph, Outcome()
    for node in list(graph):
        if node.domain or node.op_type not in ("LayerNormalization", "Gelu"):
            continue
        reason = _gelu(graph, node) if node.op_type == "Gelu" else _norm(graph, node)
        if reason:
            outcome.skip(node, reason)
        else:
            outcome.changed += 1
    return outcome


def _width(value: ir.Value) -> int | None:
    width = value.shape[-1] if value.shape is not None else None
    return width if isinstance(width, int) and width % 8 == 0 else None


def _gelu(graph: ir.Graph, node: ir.Node) -> str:
    x = node.inputs[0]
    if node.attributes.get_string("approximate", "none") != "tanh":
        return "it is the exact form"
    parts = with_bias(x) if x is not None else None
    if x is None or parts is None or _width(x) is None:
        return "its input is not a product with a stored bias, of a multiple of 8 columns"
    put(graph, node, new_node(NATIVE, "BiasGelu", parts, like=node.outputs[0]))
    return ""


def _norm(graph: ir.Graph, node: ir.Node) -> str:
    total = node.inputs[0]
    add = total.producer() if total is not None else None
    if total is None or add is None or add.op_type != "Add" or add.domain:
        return "its input is no sum"
    width = _width(total)
    if len(node.inputs) != 3 or None in node.inputs or width is None or width > _MOST_COLUMNS:
        return f"the kernel takes a weight, an offset, and a multiple of 8 columns, {_MOST_COLUMNS} at most"
    for value, residual in (tuple(add.inputs), tuple(reversed(add.inputs))):
        parts = with_bias(value) if value is not None and sole_user(value) is add else None
        if parts is None or residual is None or residual.shape is None or total.shape is None or len(residual.shape) != len(total.shape):
            continue
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        fused = new_node(NATIVE, "ResidualNorm", [*parts, residual, *node.inputs[1:]], 2, like=node.outputs[0], epsilon=epsilon)
        graph.insert_after(add, fused)
        for old, new in ((total, fused.outputs[0]), (node.outputs[0], fused.outputs[1])):
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            new.shape, new.name = old.shape, old.name
        graph.remove([node, add], safe=True)
        return ""
    return "no part of the sum is a product with a stored bias"
