"""qwen::moe on the plugin's kernel, which computes the selected experts only."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.moe_op import moe
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.rewrite import Replacement

MOE = "Moe"
# Where it takes the weights of the experts.
WEIGHT_INPUTS = (moe.inputs.index("gate_up"), moe.inputs.index("down"))


def lower_experts_plugin(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::moe(x, logits, gate_up, down) -> qwen.native::Moe(x, logits, gate_up, down): the weights in the checkpoint's layout"""
    emit = Emitter(graph, experts_prefix(node), shared)
    (y,) = emit(NATIVE, MOE, list(node.inputs), like=node.outputs[0], top_k=node.attributes.get_int("top_k"))
    return emit.nodes, [y]


def experts_prefix(node: ir.Node) -> str:
    """`layers.3.mlp` for the node whose experts are those of layer 3."""
    weight = node.inputs[WEIGHT_INPUTS[0]]
    return str(weight and weight.name).split(".experts.")[0]
