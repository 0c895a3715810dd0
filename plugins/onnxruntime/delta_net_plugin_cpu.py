"""gated_delta_net on our CPU kernel: everything between the projections is one op, with or without pending tokens.

Two products feed it. q, k, v and z are one; the gates a and b are another, because they stay in high precision when the rest is quantized.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.weights.expression import Stacked, Transposed, add_weight, weight_of
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.onnxruntime.delta_net_builtin_cpu import decay_scale
from qwen_export.plugins.rewrite import Replacement, layer_prefix, producing_linear, regroup_pending


def lower_delta_net_plugin_cpu(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """Given  y, h', S' = gated_delta_net(linear(x, Wqkv), linear(x, Wz), linear(x, Wb), linear(x, Wa), ..., h, S[, pending ...])
    Result linear x2 (q|k|v|z and a|b), qwen.native::DeltaNetTransaction

    The layer's pending inputs and outputs become two, pending_qkvz [B,P,C+Hv*Dv] and pending_ab [B,P,2*Hv]."""
    layer = layer_prefix(node)
    emit = Emitter(graph, f"{layer}.linear_attn", shared)
    given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    x, qkv = producing_linear(given["qkv"])
    z, a, b = (producing_linear(given[name])[1] for name in ("z", "a", "b"))
    packed = emit.linear(x, Stacked((qkv, z)), f"{emit.prefix}.in_proj_qkvz")
    gates = emit.linear(x, Stacked((a, b)), f"{emit.prefix}.in_proj_ab")
    for value, parts in ((packed, (qkv, z)), (gates, (a, b))):
        value.shape = ir.Shape(["B", "T", sum(part.shape[0] for part in parts)])
    transaction: list[ir.Value | None] = []
    if "accepted" in given:
        transaction = [*regroup_pending(graph, layer, {"pending_qkvz": packed, "pending_ab": gates}), given["accepted"], given["commit"]]
    state, history = given["state"], given["conv_history"]
    if state is None or history is None:
        raise TypeError("a DeltaNet layer has no state")
    y, history_out, state_out = emit(
        NATIVE,
        "DeltaNetTransaction",
        [packed, gates, _taps(graph, given), decay_scale(graph, given), given["dt_bias"], given["norm"], history, state, *transaction],
        3,
        like=packed,
        key_heads=context.config.linear_num_key_heads,
        epsilon=node.attributes.get_float("eps"),
    )
    return emit.nodes, [y, history_out, state_out]


def _taps(graph: ir.Graph, given: dict[str, ir.Value | None]) -> ir.Value:
    """The convolution's weight [K,C]: channels are the kernel's vector lanes."""
    value = given["conv_weight"]
    weight = weight_of(value)
    if value is None or weight is None:
        raise TypeError("the convolution has no stored weight")
    return add_weight(graph, f"{value.name}.taps", Transposed(weight))
