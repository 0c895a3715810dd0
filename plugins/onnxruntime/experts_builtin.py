"""qwen::moe on com.microsoft's MoE, which computes the selected experts only."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext
from qwen_export.graphs.weights.expression import Interleaved, add_weight, weight_of
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.onnxruntime.experts_plugin import experts_prefix
from qwen_export.plugins.rewrite import Replacement


def lower_experts_builtin(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::moe(x, logits, gate_up, down) -> com.microsoft::MoE(x, Reshape(logits), rows of gate and up interleaved, -, down)

    The kernel takes the softmax over the selected logits, which is that over all of them, renormalized. Its SwiGLU is
    g sigmoid(alpha g) (u + beta)."""
    emit = Emitter(graph, experts_prefix(node), shared)
    x, logits, gate_up, down = node.inputs
    weight = weight_of(gate_up)
    if weight is None or gate_up is None:
        raise TypeError(f"the experts of {node.name} have no stored weight")
    interleaved = add_weight(graph, f"{gate_up.name}.interleaved", Interleaved(weight))
    (rows,) = emit("", "Reshape", [logits, emit.ints(-1, context.config.num_experts)], like=logits)
    (y,) = emit(
        MICROSOFT,
        "MoE",
        [x, rows, interleaved, None, down],
        like=node.outputs[0],
        k=node.attributes.get_int("top_k"),
        normalize_routing_weights=1,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
    )
    return emit.nodes, [y]
