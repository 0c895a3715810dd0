"""gated_delta_net on the LinearAttention kernels (ONNX Runtime CPU), for any number of sequences with counts of their own.

The L2 norm of queries and keys keeps its epsilon: x / sqrt(sum x^2 + e) is an RMS norm over Dk values with epsilon e/Dk and weight
1/sqrt(Dk), so the kernel for RMS norms computes it exactly. A token with decay 0 (in log space) and beta 0 leaves a state unchanged, to
the bit: so tokens that must not enter are masked, not cut out.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.gated_delta_net_op import L2_EPS, gated_delta_net
from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext
from qwen_export.graphs.weights.expression import NegativeExp, Reshaped, StoredWeight, add_weight, weight_of
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.onnxruntime.ragged_rows import RaggedRows, gather_rows
from qwen_export.plugins.rewrite import Replacement, layer_prefix

Given = dict[str, ir.Value | None]


def lower_delta_net_builtin_cpu(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """Given  y, h', S' = gated_delta_net(qkv, z, b, a, ..., h, S)           nothing pending
    Result CausalConvWithState, Split, Reshape, SimplifiedLayerNormalization, Reshape, Split, LinearAttentionGate, LinearAttention,
           GatedRMSNorm

    Given  y, h', S' = gated_delta_net(qkv, z, b, a, ..., h, S, pending_qkv, pending_b, pending_a, accepted, commit)
    Result the same over the columns of `RaggedRows`; LinearAttention twice, as described there"""
    emit = Emitter(graph, f"{layer_prefix(node)}.linear_attn", shared)
    given: Given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    eps = node.attributes.get_float("eps")
    if "accepted" in given:
        o, history, state = _with_pending(emit, given, context)
    else:
        u, history = causal_conv(emit, given)
        o, state = _recurrence(emit, [*_heads(emit, u, context), *_gates(emit, given)], given["state"], context)
    (y,) = emit(MICROSOFT, "GatedRMSNorm", [o, given["norm"], given["z"]], like=given["z"], activation="silu", epsilon=eps)
    return emit.nodes, [y, history, state]


def _with_pending(emit: Emitter, given: Given, context: PassContext) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Outputs of the new tokens, the next history and the next state."""
    rows = _ragged_rows(emit, given)
    # The history is read here and nowhere else: the next one may be written over it.
    source = emit.concat([given["conv_history"], rows.pending(emit, given["pending_qkv"]), given["qkv"]], axis=1)
    given |= {"conv_history": gather_rows(emit, source, rows.history), "qkv": gather_rows(emit, source, rows.columns)}
    u, _ = causal_conv(emit, given)
    for name in ("b", "a"):
        joined = emit.concat([rows.pending(emit, given[f"pending_{name}"]), given[name]], axis=1)
        given[name] = gather_rows(emit, joined, rows.gates)
    # Where and not Mul: a gate of a pending row that was not accepted may be NaN.
    masked = [emit("", "Where", [rows.enters, gate, emit.scalar(0.0)], like=gate)[0] for gate in _gates(emit, given)]
    gates = [emit("", "Split", [gate, rows.lengths], 2, like=gate, axis=1) for gate in masked]
    tokens = [rows.both(emit, x) for x in _heads(emit, u, context)] + gates
    first, again = (list(part) for part in zip(*tokens, strict=True))
    o, state = _recurrence(emit, first, given["state"], context)
    o_again, _ = _recurrence(emit, again, state, context)
    results = gather_rows(emit, emit.concat([o, o_again], axis=1), rows.results)
    return results, gather_rows(emit, source, rows.next_history), state


def _ragged_rows(emit: Emitter, given: Given) -> RaggedRows:
    """The rows of the call, made by the first layer and read by all."""
    accepted, commit, new, weight = given["accepted"], given["commit"], given["qkv"], weight_of(given["conv_weight"])
    if accepted is None or commit is None or new is None or weight is None:
        raise TypeError("a transaction has no counts, or a convolution no stored weight")
    return emit.shared("ragged_rows", lambda: RaggedRows.emit(emit, new, accepted, commit, weight.shape[1] - 1))


def _heads(emit: Emitter, u: ir.Value, context: PassContext) -> list[ir.Value]:
    """q, k and v of the convolved rows; q and k are normalized per head."""
    config = context.config
    Hk, Dk = config.linear_num_key_heads, config.linear_key_head_dim
    qk, v = emit.split(u, [2 * Hk * Dk, config.value_dim], axis=2)
    unit = emit.filled(f"l2_scale_{Dk}", Dk**-0.5, Dk, context.activation)
    heads = emit.reshape(qk, 0, 0, 2 * Hk, Dk)
    (normed,) = emit("", "SimplifiedLayerNormalization", [heads, unit], like=u, axis=-1, epsilon=L2_EPS / Dk, stash_type=1)
    q, k = emit("", "Split", [emit.reshape(normed, 0, 0, 2 * Hk * Dk)], 2, like=u, axis=2, num_outputs=2)
    return [q, k, v]


def _gates(emit: Emitter, given: Given) -> tuple[ir.Value, ir.Value]:
    """The decay, in log space, and beta: f32[B,tokens,Hv]."""
    inputs = [given["a"], given["dt_bias"], decay_scale(emit.graph, given), given["b"]]
    decay, beta = emit(MICROSOFT, "LinearAttentionGate", inputs, 2, like=given["a"])
    return decay, beta


def _recurrence(emit: Emitter, tokens: list[ir.Value], state: ir.Value | None, context: PassContext) -> tuple[ir.Value, ir.Value]:
    """o and the next state for q, k, v, decay, beta."""
    q, k, v, decay, beta = tokens
    config = context.config
    o, after = emit(
        MICROSOFT,
        "LinearAttention",
        [q, k, v, state, decay, beta],
        2,
        like=v,
        q_num_heads=config.linear_num_key_heads,
        kv_num_heads=config.linear_num_value_heads,
        scale=config.linear_key_head_dim**-0.5,
        update_rule="gated_delta",
    )
    return o, after


def causal_conv(emit: Emitter, given: Given) -> tuple[ir.Value, ir.Value]:
    """The causal convolution with SiLU, channels last: u [B,T,C] and the next history."""
    weight = weight_of(given["conv_weight"])
    if weight is None or given["conv_weight"] is None:
        raise TypeError("the convolution has no stored weight")
    C, K = weight.shape
    kernel = add_weight(emit.graph, f"{given['conv_weight'].name}.kernel", Reshaped(weight, (C, 1, K)))
    inputs = [given["qkv"], kernel, None, given["conv_history"]]
    u, history = emit(MICROSOFT, "CausalConvWithState", inputs, 2, like=given["qkv"], activation="silu", channels_last=1)
    return u, history


def decay_scale(graph: ir.Graph, given: Given) -> ir.Value:
    """-exp(A_log), folded in fp32."""
    value = given["a_log"]
    weight = weight_of(value)
    if value is None or not isinstance(weight, StoredWeight):
        raise TypeError("A_log is not a stored tensor")
    return add_weight(graph, f"{value.name}.decay", NegativeExp(weight))
