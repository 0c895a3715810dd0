"""qwen::moe on a kernel that computes the selected experts only."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.moe_op import moe
from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext
from qwen_export.graphs.weights.expression import Interleaved, add_weight, weight_of
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.rewrite import Replacement

MOE = "Moe"
# Where it takes the weights of the experts.
WEIGHT_INPUTS = (moe.inputs.index("gate_up"), moe.inputs.index("down"))


def lower_native_moe(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::moe(x, logits, gate_up, down) -> qwen.native::Moe(x, logits, gate_up, down): the weights in the checkpoint's layout"""
    emit = Emitter(graph, _prefix(node), shared)
    (y,) = emit(NATIVE, MOE, list(node.inputs), like=node.outputs[0], top_k=node.attributes.get_int("top_k"))
    return emit.nodes, [y]


def lower_microsoft_moe(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::moe(x, logits, gate_up, down) -> com.microsoft::MoE(x, Reshape(logits), rows of gate and up by turns, -, down)

    The kernel takes the softmax over the selected logits, which is that over all of them, renormalized. Its SwiGLU is
    g sigmoid(alpha g) (u + beta)."""
    emit = Emitter(graph, _prefix(node), shared)
    x, logits, gate_up, down = node.inputs
    weight = weight_of(gate_up)
    if weight is None or gate_up is None:
        raise TypeError(f"the experts of {node.name} have no stored weight")
    by_turns = add_weight(graph, f"{gate_up.name}.interleaved", Interleaved(weight))
    (rows,) = emit("", "Reshape", [logits, emit.ints(-1, context.config.num_experts)], like=logits)
    (y,) = emit(
        MICROSOFT,
        "MoE",
        [x, rows, by_turns, None, down],
        like=node.outputs[0],
        k=node.attributes.get_int("top_k"),
        normalize_routing_weights=1,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
    )
    return emit.nodes, [y]


def _prefix(node: ir.Node) -> str:
    """`layers.3.mlp` for the node whose experts are those of layer 3."""
    weight = node.inputs[WEIGHT_INPUTS[0]]
    return str(weight and weight.name).split(".experts.")[0]
