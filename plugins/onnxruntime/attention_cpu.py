"""gated_attention on GroupQueryAttention (ONNX Runtime CPU).

The kernel rotates by a table with a row per cache slot and writes the cache in place where input and output share a buffer. The
interleaved query and gate rows of q_proj are separated when the weight is written, so no node splits them.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.bundle_contract import LAST_SLOT, LENGTH, TABLES, TOTAL_LENGTH
from qwen_export.errors import REPORT, CaptureError
from qwen_export.graphs.ops.gated_attention_op import gated_attention
from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext
from qwen_export.graphs.weights.expression import Offset, StoredWeight, add_weight, weight_of
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.rewrite import Replacement, layer_prefix, producing_linear, query_and_gate


def lower_attention_cpu(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """Given  y, K', V' = gated_attention(linear(x, Wq), linear(x, Wk), linear(x, Wv), ..., length)
    Result linear x2 (query, gate), per-head norm of q and k (Reshape, SimplifiedLayerNormalization, Reshape), GroupQueryAttention,
           Sigmoid, Mul"""
    prefix = f"{layer_prefix(node)}.self_attn"
    emit = Emitter(graph, prefix, shared)
    given = dict(zip(gated_attention.inputs, node.inputs, strict=True))
    x, packed = producing_linear(given["q_gate"])
    query_rows, gate_rows = query_and_gate(packed, context)
    q = emit.linear(x, query_rows, f"{prefix}.q_proj.query")
    gate = emit.linear(x, gate_rows, f"{prefix}.q_proj.gate")
    q = _head_norm(emit, q, head_norm_weight(graph, given["q_norm"]), context)
    k = _head_norm(emit, given["k"], head_norm_weight(graph, given["k_norm"]), context)
    o, k_cache, v_cache = attend(emit, [q, k, given["v"]], given, context)
    return emit.nodes, [gated(emit, o, gate), k_cache, v_cache]


def head_norm_weight(graph: ir.Graph, value: ir.Value | None) -> ir.Value:
    """1 + w of a per-head norm, folded in fp32."""
    weight = weight_of(value)
    if value is None or not isinstance(weight, StoredWeight):
        raise TypeError("a head norm has no stored weight")
    return add_weight(graph, f"{value.name}.scale", Offset(weight, 1.0))


def attend(
    emit: Emitter, qkv: list[ir.Value | None], given: dict[str, ir.Value | None], context: PassContext, extra: tuple[ir.Value, ...] = ()
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """GroupQueryAttention over the cache; `extra` are the norm weights where the kernel applies them."""
    config, graph = context.config, emit.graph
    last, total = slot_inputs(graph)
    tables = [rotary_input(graph, name, context.activation) for name in TABLES]
    inputs = [*qkv, given["k_cache"], given["v_cache"], last, total, *tables]
    if extra:
        inputs += [None, None, None, None, None, *extra]
    o, k_cache, v_cache = emit(
        MICROSOFT,
        "GroupQueryAttention",
        inputs,
        3,
        dtype=context.activation,
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        scale=config.head_dim**-0.5,
        do_rotary=1,
        **({"qk_norm_epsilon": config.rms_norm_eps} if extra else {}),
    )
    return o, k_cache, v_cache


def gated(emit: Emitter, o: ir.Value, gate: ir.Value) -> ir.Value:
    (opened,) = emit("", "Sigmoid", [gate], like=o)
    return emit("", "Mul", [o, opened], like=o)[0]


def _head_norm(emit: Emitter, x: ir.Value | None, weight: ir.Value, context: PassContext) -> ir.Value:
    D = context.config.head_dim
    (heads,) = emit("", "Reshape", [x, emit.ints(0, 0, -1, D)], like=x)
    (normed,) = emit(
        "", "SimplifiedLayerNormalization", [heads, weight], like=x, axis=-1, epsilon=context.config.rms_norm_eps, stash_type=1
    )
    size = weight_of(x.producer().inputs[1]).shape[0]  # type: ignore[union-attr]
    return emit("", "Reshape", [normed, emit.ints(0, 0, size)], like=x)[0]


def slot_inputs(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """The graph inputs that the kernel takes instead of `length`: last_slot i32[B] = length + T - 1 and total_length i32 = their
    maximum + 1. They replace `length` in the signature."""
    named = {value.name: value for value in graph.inputs}
    if LAST_SLOT not in named:
        at = graph.inputs.index(named[LENGTH])
        last = ir.Value(name=LAST_SLOT, shape=ir.Shape(["B"]), type=ir.TensorType(ir.DataType.INT32))
        total = ir.Value(name=TOTAL_LENGTH, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32))
        graph.inputs.insert(at, last)
        graph.inputs.insert(at + 1, total)
        named |= {LAST_SLOT: last, TOTAL_LENGTH: total}
    return named[LAST_SLOT], named[TOTAL_LENGTH]


def rotary_input(graph: ir.Graph, name: str, dtype: ir.DataType) -> ir.Value:
    """The cos or sin table, which the kernel takes in the activation dtype."""
    for value in graph.inputs:
        if value.name == name:
            value.type = ir.TensorType(dtype)
            return value
    raise CaptureError("the graph has no rotary table", where=name, fix=REPORT)
