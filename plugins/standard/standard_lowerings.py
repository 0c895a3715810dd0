"""The ops of domain qwen on standard operators; on DirectML, single tokens go to its GroupQueryAttention."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.ops.gated_attention_op import gated_attention
from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import LINEAR
from qwen_export.graphs.quantization.precision_plan import GroupFormat
from qwen_export.graphs.weights.expression import Weight, weight_of
from qwen_export.plugins.decompose import decompose_attention as attention
from qwen_export.plugins.decompose import decompose_delta_net as delta_net
from qwen_export.plugins.decompose.channel_convolution import channel_convolution
from qwen_export.plugins.decompose.chunks_in_turn import in_chunks
from qwen_export.plugins.decompose.decompose_norm import emit_rms_norm, norm_weight
from qwen_export.plugins.decompose.delta_rule import delta_rule
from qwen_export.plugins.decompose.norm_emitters import NodeEmitter, PowerEmitter
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.rewrite import Lowering, Replacement, layer_prefix, lower_ops, offset_weight, producing_linear, query_and_gate
from qwen_export.plugins.standard.standard_experts import lower_experts
from qwen_export.plugins.standard.standard_pictures import lower_picture_attention, lower_place_features
from qwen_export.plugins.standard.standard_quantized import chosen_format, nbits_product, rounded_product

_FEW_ROWS = 2, 64
"""Where the turned product is the faster one, measured with ONNX Runtime 1.31 and matrices of 1024 to 100000 rows."""

QuantizedProduct = Callable[[Emitter, ir.Value, str, Weight, GroupFormat, PassContext], ir.Value]


def lower_delta_net(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """gated_delta_net -> convolution as shifted products, gates, the chunk form of the delta rule, gated norm."""
    return _delta_net(graph, node, context, shared, delta_net.shifted_products)


def lower_channel_delta_net(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """The same; prompts have a grouped Conv over the projection with channels first."""
    sizes = context.static
    return _delta_net(graph, node, context, shared, channel_convolution if sizes.T > 1 and not sizes.P else delta_net.shifted_products)


def _delta_net(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared, convolve: delta_net.Convolution) -> Replacement:
    emit = _norms_of(context)(graph, f"{layer_prefix(node)}.linear_attn", shared)
    given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    sizes = delta_net.DeltaNetSizes.of(context.config, context.static.T, context.static.P)
    if convolve is channel_convolution:
        given["qkv"] = _channels_first(emit, given["qkv"], sizes.T, context)
    # A verify has outputs for tokens that it does not commit: a chunk's end must not separate these from each other.
    rule = delta_rule if sizes.P else in_chunks(context.static.chunk)
    results = delta_net.emit_gated_delta_net(emit, given, sizes, node.attributes.get_float("eps"), context.activation, rule, convolve)
    return emit.nodes, list(results)


def _channels_first(emit: Emitter, projected: ir.Value | None, T: int, context: PassContext) -> ir.Value:
    """A projection [1,T,N] as [1,N,T], at no cost where its weight is not quantized."""
    x, weight = producing_linear(projected)
    node = projected.producer() if projected is not None else None
    if projected is None or node is None:
        raise TypeError("a projection has no product")
    if chosen_format(weight, context) is not None:
        return emit.transpose(projected, 0, 2, 1)
    N, K = weight.shape
    (product,) = emit("", "Gemm", [node.inputs[1], emit.reshape(x, T, K)], like=x, transB=1)
    return emit.reshape(product, 1, N, T)


def _norms_of(context: PassContext) -> type[Emitter]:
    """The emitter that writes the norms within a mixer as the target has all others."""
    return {"decomposed": PowerEmitter, "rms_normalization": NodeEmitter}.get(context.choices["rms_norm"].name, Emitter)


def lower_attention(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """gated_attention -> norms and rotation, ScatterND into the caches, masked softmax."""
    return _attention(graph, node, context, shared, attention.scatter)


def _attention(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared, write: attention.CacheWrite) -> Replacement:
    emit, layer = attention_parts(graph, node, context, shared, _norms_of(context))
    return emit.nodes, list(attention.emit_gated_attention(emit, layer, write))


def lower_one_token_attention(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """One token: com.microsoft.GroupQueryAttention, with the rotation outside. More: as `lower_attention`, the caches written by Where.

    DirectML's GroupQueryAttention takes the past into account for T = 1 only, and it has no ScatterND of opset 18 or later
    (plugins/directml)."""
    if context.static.T > 1:
        return _attention(graph, node, context, shared, attention.select)
    emit, layer = attention_parts(graph, node, context, shared, _norms_of(context))
    given, sizes = layer.given, layer.sizes
    q_heads, k_heads = attention.rotated_heads(emit, layer, sizes.D**-0.5)
    flat = [emit.reshape(q_heads, 1, 1, sizes.Hq * sizes.D), emit.reshape(k_heads, 1, 1, sizes.Hkv * sizes.D), given["v"]]
    slots = emit.array(f"slots_i32_{sizes.S}", np.array(sizes.S, np.int32))
    o, k_cache, v_cache = emit(
        MICROSOFT,
        "GroupQueryAttention",
        [*flat, given["k_cache"], given["v_cache"], given["length"], slots],
        3,
        dtype=context.activation,
        num_heads=sizes.Hq,
        kv_num_heads=sizes.Hkv,
        scale=1.0,
        do_rotary=0,
    )
    return emit.nodes, [emit.mul(o, emit.sigmoid(layer.gate)), k_cache, v_cache]


def attention_parts(
    graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared, kind: type[Emitter] = Emitter
) -> tuple[Emitter, attention.Layer]:
    """q_proj's interleaved halves become two products, so that no node takes them apart."""
    prefix, config = f"{layer_prefix(node)}.self_attn", context.config
    emit = kind(graph, prefix, shared)
    given = dict(zip(gated_attention.inputs, node.inputs, strict=True))
    x, packed = producing_linear(given["q_gate"])
    query_rows, gate_rows = query_and_gate(packed, context)
    q, gate = emit.linear(x, query_rows, f"{prefix}.q_proj.query"), emit.linear(x, gate_rows, f"{prefix}.q_proj.gate")
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rotary_dim)
    sizes = attention.AttentionSizes(context.static.T, context.static.S, *heads)
    return emit, attention.Layer(given, q, gate, sizes, config.rms_norm_eps, context.activation)


def lower_decomposed_norm(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::rms_norm -> Pow, ReduceMean, Add, Sqrt, Div, Mul in fp32."""
    emit = PowerEmitter(graph, _norm_name(node))
    weight = norm_weight(emit, node.inputs[1], node.attributes.get_float("offset"))
    y = emit_rms_norm(emit, node.inputs[0], weight, node.attributes.get_float("eps"), context.activation)
    return emit.nodes, [y]


def lower_rms_normalization(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::rms_norm -> RMSNormalization (opset 23), fp32 statistics."""
    return _one_node(graph, node, "RMSNormalization")


def lower_simplified_norm(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::rms_norm -> SimplifiedLayerNormalization, ONNX Runtime's name for it below opset 23; one output, as DirectML requires."""
    return _one_node(graph, node, "SimplifiedLayerNormalization")


def _one_node(graph: ir.Graph, node: ir.Node, op: str) -> Replacement:
    emit = Emitter(graph, _norm_name(node))
    inputs = [node.inputs[0], offset_weight(graph, node)]
    (y,) = emit("", op, inputs, like=node.outputs[0], axis=-1, epsilon=node.attributes.get_float("eps"), stash_type=1)
    return emit.nodes, [y]


def _norm_name(node: ir.Node) -> str:
    return (node.inputs[1].name or "norm").removesuffix(".weight") if node.inputs[1] is not None else "norm"


def lower_gemm(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::linear -> Gemm with transB: the weight [N,K] as it is stored. Quantized: MatMulNBits."""
    emit, x, value, weight = linear_parts(graph, node, shared)
    N, K = weight.shape
    product = _quantized_product(emit, x, value, weight, context, nbits_product)
    if product is not None:
        return emit.nodes, [product]
    (product,) = emit("", "Gemm", [x if is_matrix(x) else emit.reshape(x, -1, K), value], like=x, transB=1)
    return emit.nodes, [product if is_matrix(x) else emit.reshape(product, 1, -1, N)]


def lower_turned_product(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::linear -> (W x^T)^T for a few rows, else Gemm. Quantized: MatMulNBits.

    ONNX Runtime's CPU products copy a right-hand matrix into another order first, which for few rows costs more than the product; the
    left-hand one they read in place. With 4 rows this is a third of Gemm's time for a large matrix, with one row Gemm is as fast."""
    emit, x, value, weight = linear_parts(graph, node, shared)
    product = _quantized_product(emit, x, value, weight, context, rounded_product)
    if product is not None:
        return emit.nodes, [product]
    rows = x.shape[-2] if x.shape is not None else 0
    if not isinstance(rows, int) or not _FEW_ROWS[0] <= rows <= _FEW_ROWS[1]:
        return lower_gemm(graph, node, context, shared)
    perm = (1, 0) if is_matrix(x) else (0, 2, 1)
    turned = emit.shared(f"{x.name}.turned", lambda: emit.transpose(x, *perm))
    return emit.nodes, [emit.transpose(emit.matmul(value, turned), *perm)]


def _quantized_product(
    emit: Emitter, x: ir.Value, value: ir.Value, weight: Weight, context: PassContext, make: QuantizedProduct
) -> ir.Value | None:
    """The product over the codes of the weight, None where the plan does not quantize it."""
    chosen = chosen_format(weight, context)
    return make(emit, x, value.name or "linear", weight, chosen, context) if chosen is not None else None


def linear_parts(graph: ir.Graph, node: ir.Node, shared: Shared) -> tuple[Emitter, ir.Value, ir.Value, Weight]:
    """The input of a qwen::linear, its weight [N,K] in the graph, and that weight's expression."""
    x, value = node.inputs
    weight = weight_of(value)
    if x is None or value is None or weight is None:
        raise TypeError("a linear has no stored weight")
    return Emitter(graph, (value.name or "linear").removesuffix(".weight"), shared), x, value, weight


def is_matrix(x: ir.Value) -> bool:
    """Whether the rows of a product are [rows, K], as those of the LM head, and not [1, T, K]."""
    return x.shape is not None and len(x.shape) == 2


LOWERINGS: dict[tuple[str, str], Lowering] = {
    ("gated_delta_net", "chunked"): lower_delta_net,
    ("gated_delta_net", "chunked_channels"): lower_channel_delta_net,
    ("gated_attention", "scattered_cache"): lower_attention,
    ("gated_attention", "one_token_kernel"): lower_one_token_attention,
    ("moe", "gathered"): lower_experts,
    ("picture_attention", "masked_parts"): lower_picture_attention,
    ("place_features", "where"): lower_place_features,
    ("rms_norm", "decomposed"): lower_decomposed_norm,
    ("rms_norm", "rms_normalization"): lower_rms_normalization,
    ("rms_norm", "simplified_norm"): lower_simplified_norm,
    (LINEAR, "gemm"): lower_gemm,
    (LINEAR, "turned_product"): lower_turned_product,
}


def lower_mixers(model: ir.Model, context: PassContext) -> Outcome:
    """Lower the two stateful ops. They regroup the projections that feed them, so linears are lowered after them."""
    return lower_ops(model, context, ("gated_delta_net", "gated_attention"), LOWERINGS)


def lower_simple_ops(model: ir.Model, context: PassContext) -> Outcome:
    """Lower everything else of domain qwen."""
    return lower_ops(model, context, ("moe", "place_features", "rms_norm", LINEAR), LOWERINGS)


def lower_tower(model: ir.Model, context: PassContext) -> Outcome:
    """Lower the ops of a vision tower."""
    return lower_ops(model, context, ("picture_attention", LINEAR), LOWERINGS)
