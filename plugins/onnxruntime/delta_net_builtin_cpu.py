"""gated_delta_net on the LinearAttention kernels (ONNX Runtime CPU).

The L2 norm of queries and keys keeps its epsilon: x / sqrt(sum x^2 + e) is an RMS norm over Dk values with epsilon e/Dk and weight
1/sqrt(Dk), so the kernel for RMS norms computes it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qwen_export.graphs.ops.gated_delta_net_op import L2_EPS, gated_delta_net
from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext
from qwen_export.graphs.weights.expression import NegativeExp, Reshaped, StoredWeight, add_weight, weight_of
from qwen_export.plugins.rewrite import Emitter, layer_prefix


def lower_linear_attention(graph: ir.Graph, node: ir.Node, context: PassContext) -> tuple[list[ir.Node], list[ir.Value]]:
    """Given  y, h', S' = gated_delta_net(qkv, z, b, a, ..., h, S)           nothing pending
    Result CausalConvWithState, Split, Reshape, SimplifiedLayerNormalization, Reshape, Split, LinearAttentionGate, LinearAttention,
           GatedRMSNorm

    Given  y, h', S' = gated_delta_net(qkv, z, b, a, ..., h, S, pending_qkv, pending_b, pending_a, accepted, commit)           B = 1
    Result the same over pending[:accepted] and the new tokens, one after the other; LinearAttention twice, over the tokens that enter the
           state and over those that do not"""
    config, emit = context.config, Emitter(graph, f"{layer_prefix(node)}.linear_attn")
    given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    Hk, Dk = config.linear_num_key_heads, config.linear_key_head_dim
    cut = _join_pending(emit, given) if "accepted" in given else None
    qkv, z, eps = given["qkv"], given["z"], node.attributes.get_float("eps")

    u, history = causal_conv(emit, given)
    qk, v = emit("", "Split", [u, emit.ints(2 * Hk * Dk, config.value_dim)], 2, like=u, axis=2)
    (heads,) = emit("", "Reshape", [qk, emit.ints(0, 0, 2 * Hk, Dk)], like=u)
    unit = emit.filled(f"l2_scale_{Dk}", Dk**-0.5, Dk, context.activation)
    (normed,) = emit("", "SimplifiedLayerNormalization", [heads, unit], like=u, axis=-1, epsilon=L2_EPS / Dk, stash_type=1)
    (flat,) = emit("", "Reshape", [normed, emit.ints(0, 0, 2 * Hk * Dk)], like=u)
    q, k = emit("", "Split", [flat], 2, like=u, axis=2, num_outputs=2)
    decay, beta = emit(MICROSOFT, "LinearAttentionGate", [given["a"], given["dt_bias"], decay_scale(graph, given), given["b"]], 2, like=qkv)
    tokens = [q, k, v, decay, beta]
    if cut is None:
        o, state = _recurrence(emit, tokens, given["state"], context)
    else:
        o, state = _recurrence(emit, [_rows(emit, x, emit.ints(0), cut.kept) for x in tokens], given["state"], context)
        rest, _ = _recurrence(emit, [_rows(emit, x, cut.kept, emit.ints(_END)) for x in tokens], state, context)
        (whole,) = emit("", "Concat", [o, rest], like=u, axis=1)
        o, history = _rows(emit, whole, cut.accepted, emit.ints(_END)), cut.history
    (y,) = emit(MICROSOFT, "GatedRMSNorm", [o, given["norm"], z], like=z, activation="silu", epsilon=eps)
    return emit.nodes, [y, history, state]


_END = 2**62


@dataclass(frozen=True)
class _Cut:
    """Where a sequence of tokens, pending ones first, is cut: i64[1] each. The first `accepted` are not new, the first `kept` enter the
    state; `history` is the convolution's after those."""

    accepted: ir.Value
    kept: ir.Value
    history: ir.Value


def _join_pending(emit: Emitter, given: dict[str, ir.Value | None]) -> _Cut:
    """Put pending[:accepted] before qkv, a and b in `given`. What lies behind `accepted` is cut off, not masked: it may be NaN. Counts of
    one sequence are bounds of a slice as they are."""
    accepted, commit, before = given["accepted"], given["commit"], given["conv_history"]
    weight = weight_of(given["conv_weight"])
    if accepted is None or commit is None or before is None or weight is None:
        raise TypeError("a transaction has no counts or no history")
    for name in ("qkv", "b", "a"):
        open_rows = _rows(emit, given[f"pending_{name}"], emit.ints(0), accepted)
        # The history is read here and nowhere else: the next one may be written over it.
        parts = [before, open_rows, given[name]] if name == "qkv" else [open_rows, given[name]]
        (given[name],) = emit("", "Concat", parts, like=given[name], axis=1)
    taps = weight.shape[1] - 1
    rows = given["qkv"]
    given["conv_history"] = _rows(emit, rows, emit.ints(0), emit.ints(taps))
    given["qkv"] = _rows(emit, rows, emit.ints(taps), emit.ints(_END))
    (kept,) = emit("", "Add", [accepted, commit], like=accepted)
    (end,) = emit("", "Add", [kept, emit.ints(taps)], like=kept)
    return _Cut(accepted, kept, _rows(emit, rows, kept, end))


def _rows(emit: Emitter, x: ir.Value | None, start: ir.Value, end: ir.Value) -> ir.Value:
    return emit("", "Slice", [x, start, end, emit.ints(1)], like=x)[0]


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
