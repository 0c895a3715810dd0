"""gated_delta_net on our own kernel: everything between the projections is one launch for up to 9 tokens, four or five for more.

As in delta_net_builtin_cuda.py one product makes qkv, z, a and b, and the state is V-major. In a build with speculation the whole
product stays pending: one tensor per layer, and nothing to split.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.weights.expression import Stacked
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.rewrite import Replacement, layer_prefix, producing_linear, regroup_pending


def lower_delta_net_plugin_cuda(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """Given  y, h', S' = gated_delta_net(linear(x, Wqkv), linear(x, Wz), linear(x, Wb), linear(x, Wa), ..., h, S)
           or  y, h', S' = gated_delta_net(..., h, S, pending_qkv, pending_b, pending_a, accepted, commit)
    Result linear, qwen.native::DeltaNet, of the second form with inputs pending, accepted, commit"""
    config, layer = context.config, layer_prefix(node)
    prefix = f"{layer}.linear_attn"
    emit = Emitter(graph, prefix, shared)
    given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    parts = [producing_linear(given[name]) for name in ("qkv", "z", "a", "b")]
    packed = emit.linear(parts[0][0], Stacked(tuple(weight for _, weight in parts)), f"{prefix}.in_proj")
    packed.shape = ir.Shape(["B", "T", config.conv_dim + config.value_dim + 2 * config.linear_num_value_heads])
    state, history = given["state"], given["conv_history"]
    if state is None or history is None:
        raise TypeError("a DeltaNet layer has no state")
    state.shape = ir.Shape(["B", config.linear_num_value_heads, config.linear_value_head_dim, config.linear_key_head_dim])
    transaction: list[ir.Value | None] = []
    if given.get("accepted") is not None:
        transaction = [*regroup_pending(graph, layer, {"pending": packed}), given["accepted"], given["commit"]]
    y, history_out, state_out = emit(
        NATIVE,
        "DeltaNet",
        [packed, *(given[name] for name in ("conv_weight", "a_log", "dt_bias", "norm", "conv_history", "state")), *transaction],
        3,
        like=packed,
        key_heads=config.linear_num_key_heads,
        epsilon=node.attributes.get_float("eps"),
    )
    state_out.type, state_out.shape, history_out.shape = state.type, state.shape, history.shape
    return emit.nodes, [y, history_out, state_out]
