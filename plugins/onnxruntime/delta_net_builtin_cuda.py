"""gated_delta_net on the GatedDeltaNet kernel (ONNX Runtime CUDA): gates, L2 norm and recurrence are one launch, the state is fp32.

One matrix product makes qkv, z, b and a: at one token per step a launch costs more than the copy that separates them. The kernel's state
is V-major, [B,Hv,Dv,Dk]; it is only ever read by this graph.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext
from qwen_export.graphs.weights.expression import Stacked
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.onnxruntime.delta_net_builtin_cpu import causal_conv
from qwen_export.plugins.rewrite import Replacement, layer_prefix, producing_linear


def lower_delta_net_builtin_cuda(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """Given  y, h', S' = gated_delta_net(linear(x, Wqkv), linear(x, Wz), linear(x, Wb), linear(x, Wa), ...)
    Result linear, Split, CausalConvWithState, Cast, Split, GatedDeltaNet, Reshape, GatedRMSNorm"""
    config, prefix = context.config, f"{layer_prefix(node)}.linear_attn"
    emit = Emitter(graph, prefix, shared)
    given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    Hk, Hv, Dk, Dv = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    parts = [producing_linear(given[name]) for name in ("qkv", "z", "a", "b")]
    packed = emit.linear(parts[0][0], Stacked(tuple(weight for _, weight in parts)), f"{prefix}.in_proj")
    qkv, z, gates = emit("", "Split", [packed, emit.ints(config.conv_dim, config.value_dim, 2 * Hv)], 3, like=packed, axis=2)
    given["qkv"] = qkv
    u, history = causal_conv(emit, given)
    if context.precision != "fp32":
        (gates,) = emit("", "Cast", [gates], dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    a, b = emit("", "Split", [gates], 2, dtype=ir.DataType.FLOAT, axis=2, num_outputs=2)
    state = given["state"]
    if state is not None:
        state.shape = ir.Shape(["B", Hv, Dv, Dk])
    q, k, v = emit("", "Split", [u, emit.ints(Hk * Dk, Hk * Dk, Hv * Dv)], 3, like=u, axis=2)
    heads = [emit("", "Reshape", [x, emit.ints(0, 0, n, d)], like=u)[0] for x, n, d in ((q, Hk, Dk), (k, Hk, Dk), (v, Hv, Dv))]
    o, after = emit(
        MICROSOFT,
        "GatedDeltaNet",
        [*heads, None, a, b, state, given["a_log"], given["dt_bias"]],
        2,
        like=u,
        update_rule="gated_delta",
        gate_activation="qwen",
        beta_activation="sigmoid",
        qk_l2_norm=1,
        scale=Dk**-0.5,
    )
    after.type = ir.TensorType(ir.DataType.FLOAT)
    after.shape = ir.Shape(["B", Hv, Dv, Dk])
    (flat,) = emit("", "Reshape", [o, emit.ints(0, 0, Hv * Dv)], like=u)
    eps = node.attributes.get_float("eps")
    (y,) = emit(MICROSOFT, "GatedRMSNorm", [flat, given["norm"], z], like=u, activation="silu", epsilon=eps)
    return emit.nodes, [y, history, after]
