"""qwen::rms_norm on the plugin's kernel, where no product has absorbed it: it overlaps with the kernels before and behind it."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext, new_node
from qwen_export.plugins.emitter import Shared
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.rewrite import Replacement, offset_weight


def lower_native_norm(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::rms_norm(x, w) -> qwen.native::RmsNorm(x, w + offset), fp32 statistics."""
    epsilon = node.attributes.get_float("eps")
    norm = new_node(NATIVE, "RmsNorm", [node.inputs[0], offset_weight(graph, node)], like=node.outputs[0], epsilon=epsilon)
    return [norm], list(norm.outputs)
