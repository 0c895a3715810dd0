"""gated_delta_net on the LinearAttention kernels (ONNX Runtime CPU).

The L2 norm of queries and keys keeps its epsilon: x / sqrt(sum x^2 + e) is an RMS norm over Dk values with epsilon e/Dk and weight
1/sqrt(Dk), so the kernel for RMS norms computes it exactly.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.context import MICROSOFT, PassContext
from qwen_export.graphs.weights.expression import NegativeExp, Reshaped, StoredWeight, add_weight, weight_of
from qwen_export.plugins.onnxruntime.common import Emitter, layer_prefix
from qwen_export.plugins.ops.gated_delta_net import L2_EPS, gated_delta_net


def lower_linear_attention(graph: ir.Graph, node: ir.Node, context: PassContext) -> tuple[list[ir.Node], list[ir.Value]]:
    """Given  y, h', S' = gated_delta_net(qkv, z, b, a, ...)           nothing pending
    Result CausalConvWithState, Split, Reshape, SimplifiedLayerNormalization, Reshape, Split, LinearAttentionGate, LinearAttention,
           GatedRMSNorm"""
    config, emit = context.config, Emitter(graph, f"{layer_prefix(node)}.linear_attn")
    given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    Hk, Hv, Dk = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_key_head_dim
    qkv, z, eps = given["qkv"], given["z"], node.attributes.get_float("eps")

    u, history = causal_conv(emit, given)
    qk, v = emit("", "Split", [u, emit.ints(2 * Hk * Dk, config.value_dim)], 2, like=u, axis=2)
    (heads,) = emit("", "Reshape", [qk, emit.ints(0, 0, 2 * Hk, Dk)], like=u)
    unit = emit.filled(f"l2_scale_{Dk}", Dk**-0.5, Dk, context.activation)
    (normed,) = emit("", "SimplifiedLayerNormalization", [heads, unit], like=u, axis=-1, epsilon=L2_EPS / Dk, stash_type=1)
    (flat,) = emit("", "Reshape", [normed, emit.ints(0, 0, 2 * Hk * Dk)], like=u)
    q, k = emit("", "Split", [flat], 2, like=u, axis=2, num_outputs=2)
    decay, beta = emit(MICROSOFT, "LinearAttentionGate", [given["a"], given["dt_bias"], decay_scale(graph, given), given["b"]], 2, like=qkv)
    o, state = emit(
        MICROSOFT,
        "LinearAttention",
        [q, k, v, given["state"], decay, beta],
        2,
        like=u,
        q_num_heads=Hk,
        kv_num_heads=Hv,
        scale=Dk**-0.5,
        update_rule="gated_delta",
    )
    (y,) = emit(MICROSOFT, "GatedRMSNorm", [o, given["norm"], z], like=z, activation="silu", epsilon=eps)
    return emit.nodes, [y, history, state]


def causal_conv(emit: Emitter, given: dict[str, ir.Value | None]) -> tuple[ir.Value, ir.Value]:
    """The causal convolution with SiLU, channels last: u [B,T,C] and the next history."""
    weight = weight_of(given["conv_weight"])
    if weight is None or given["conv_weight"] is None:
        raise TypeError("the convolution has no stored weight")
    C, K = weight.shape
    kernel = add_weight(emit.graph, f"{given['conv_weight'].name}.kernel", Reshaped(weight, (C, 1, K)))
    inputs = [given["qkv"], kernel, None, given["conv_history"]]
    u, history = emit(MICROSOFT, "CausalConvWithState", inputs, 2, like=given["qkv"], activation="silu", channels_last=1)
    return u, history


def decay_scale(graph: ir.Graph, given: dict[str, ir.Value | None]) -> ir.Value:
    """-exp(A_log), folded in fp32."""
    value = given["a_log"]
    weight = weight_of(value)
    if value is None or not isinstance(weight, StoredWeight):
        raise TypeError("A_log is not a stored tensor")
    return add_weight(graph, f"{value.name}.decay", NegativeExp(weight))
