"""The ops of domain qwen in native layers of TensorRT, as the ONNX graph that its parser reads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import LINEAR
from qwen_export.graphs.quantization.fp8 import Fp8Codes, Fp8Scales
from qwen_export.graphs.quantization.precision_plan import FP8, INT4, STORED, GroupFormat
from qwen_export.graphs.weights.expression import Weight, add_weight
from qwen_export.plugins.decompose import decompose_delta_net as delta_net
from qwen_export.plugins.decompose.batched_chunks import batched_chunks
from qwen_export.plugins.decompose.decompose_experts import routed_experts
from qwen_export.plugins.decompose.delta_rule import DeltaRule, delta_rule
from qwen_export.plugins.decompose.reduced_step import reduced_step
from qwen_export.plugins.decompose.split_product import SplitEmitter, split
from qwen_export.plugins.decompose.summed_product import SummedEmitter
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.rewrite import Lowering, Replacement, layer_prefix, lower_ops, regroup_pending
from qwen_export.plugins.standard import standard_pictures as pictures
from qwen_export.plugins.standard.standard_lowerings import (
    attention_parts,
    is_matrix,
    linear_parts,
    lower_rms_normalization,
)
from qwen_export.plugins.standard.standard_quantized import ensure_whole_blocks, quantized_parts
from qwen_export.plugins.tensorrt import tensorrt_experts as experts
from qwen_export.plugins.tensorrt.step_plugin import LONGEST, emit_plugin, one_projection, split_projection
from qwen_export.plugins.tensorrt.tensorrt_attention import emit_native_attention

# Tokens, pending ones among them, up to which the recurrence sums instead of multiplying matrices.
_MOST_SUMMED = 16
# What products over int4 weights have a fast kernel for: on SM 90, one row takes four times as long as eight.
_INT4_ROWS = 8


def lower_delta_net(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """gated_delta_net -> one token: sums over the state; a verify: the chunk form, with sums for products; a prompt: all chunks at once,
    one product per chunk in sequence. Everything fp32 between the projections."""
    emit = Emitter(graph, f"{layer_prefix(node)}.linear_attn", shared)
    given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    return emit.nodes, _native_layers(emit, given, node.attributes.get_float("eps"), context)


def lower_delta_net_plugin(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """gated_delta_net -> one product, and in short calls our plugin behind it; longer ones as `lower_delta_net`, from the same product,
    which also stays pending as a whole. The state is turned in all graphs of such a bundle, [1,Hv,Dv,Dk]."""
    layer, eps = layer_prefix(node), node.attributes.get_float("eps")
    emit = Emitter(graph, f"{layer}.linear_attn", shared)
    given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    packed = one_projection(emit, given, context)
    pending = regroup_pending(graph, layer, {"pending": packed}) if context.static.P else []
    # A prompt's call may be short, too, and is then padded without anything pending, which the kernel has no form for.
    short = context.static.T <= LONGEST and (context.static.P or not context.static.padded)
    behind = emit_plugin if short else packed_native_layers
    return emit.nodes, behind(emit, packed, pending, given, eps, context)


def packed_native_layers(
    emit: Emitter, packed: ir.Value, pending: list[ir.Value], given: dict[str, ir.Value | None], eps: float, context: PassContext
) -> list[ir.Value]:
    """What `emit_plugin` computes, in native layers: they split the product and transpose the state at both ends."""
    for rows in pending:
        parts = split_projection(emit, rows, context)
        given |= {f"pending_{name}": parts[name] for name in ("qkv", "a", "b")}
    state = given["state"]
    if state is None:
        raise TypeError("gated_delta_net has no state")
    keys_first = emit.transpose(state, 0, 1, 3, 2)
    keys_first.shape = state.shape  # Dk = Dv
    y, history, after = _native_layers(emit, {**given, **split_projection(emit, packed, context), "state": keys_first}, eps, context)
    turned = emit.transpose(after, 0, 1, 3, 2)
    turned.shape = state.shape
    return [y, history, turned]


def _native_layers(before: Emitter, given: dict[str, ir.Value | None], eps: float, context: PassContext) -> list[ir.Value]:
    """The mixer on the parts of the projection."""
    sizes = delta_net.DeltaNetSizes.of(context.config, context.static.T, context.static.P)
    few = sizes.P + sizes.T <= _MOST_SUMMED
    emit = before.continued_as(SummedEmitter if few else SplitEmitter if _exact(context) else Emitter)
    return list(delta_net.emit_gated_delta_net(emit, given, sizes, eps, context.activation, _rule(sizes.T, sizes.P, context)))


def _rule(T: int, P: int, context: PassContext) -> DeltaRule:
    """How the recurrence is computed over P pending and T new tokens."""
    if T == 1 and not P:
        return reduced_step
    if P or context.static.chunk >= T:
        return delta_rule
    # Activations have 11 bits at most in these graphs; products of fp32 operands would keep no more on tensor cores, and take longer.
    return batched_chunks(context.static.chunk, None if context.activation == ir.DataType.FLOAT else ir.DataType.FLOAT16)


def _exact(context: PassContext) -> bool:
    """Whether the compiler would round the operands of fp32 products, and must not."""
    return context.choices["linear"].name == "split_product"


def lower_attention(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """gated_attention -> RMSNormalization, RotaryEmbedding, TensorScatter, Attention."""
    return _attention(graph, node, context, shared, fused=True)


def lower_decomposed_attention(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """The same with products and a softmax instead of Attention."""
    return _attention(graph, node, context, shared, fused=False)


def _attention(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared, *, fused: bool) -> Replacement:
    emit, layer = attention_parts(graph, node, context, shared)
    if _exact(context):
        emit = emit.continued_as(SplitEmitter)
    return emit.nodes, list(emit_native_attention(emit, layer, fused=fused))


def lower_experts(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """moe -> TopK, gathered matrices, batched products."""
    moe = routed_experts(graph, node, context, shared, experts.ROWS_OF_A_GATHER)
    return moe.emit.nodes, [experts.emit_experts(moe.emit, moe.x, moe.logits, moe.gate_up, moe.down, moe.sizes)]


def lower_product(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """linear -> Gemm over the weight as the checkpoint has it, [out, in]; quantized: DequantizeLinear before it, int4 over the turned
    matrix with at least 8 rows."""
    emit, x, value, weight = linear_parts(graph, node, shared)
    N, K = weight.shape
    tokens = _rows(x)
    flat, format = x if is_matrix(x) else emit.reshape(x, -1, K), context.format_of(weight)
    if format.format == INT4:
        missing = _INT4_ROWS - tokens
        if missing > 0:
            zeros = np.zeros((missing, K), context.activation.numpy())
            flat = emit.concat([flat, emit.array(f"zeros_{missing}_{K}", zeros)], axis=0)
        product = emit.matmul(flat, _dequantized(emit, value, weight, format, context))
        if missing > 0:
            product = emit.rows(product, 0, tokens, axis=0)
    else:
        matrix = value if format.format == STORED else _dequantized(emit, value, weight, format, context)
        (product,) = emit("", "Gemm", [flat, matrix], like=x, transB=1)
    return emit.nodes, [product if is_matrix(x) else emit.reshape(product, 1, tokens, N)]


def lower_split_product(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """The same with fp32 operands kept whole: the rows of x in two parts, in one product. The weight is exact as it is where it is stored
    in 16 bits, and is split likewise where it is not."""
    emit, x, value, weight = linear_parts(graph, node, shared)
    N, K = weight.shape
    flat = x if is_matrix(x) else emit.reshape(x, -1, K)
    rows = emit.concat([*split(emit, flat)], axis=0)
    narrow = all(context.stored.get(name, "F32") in ("BF16", "F16") for name in weight.stored())
    matrices = [value] if narrow else [*split(emit, value)]
    products = [emit("", "Gemm", [rows, matrix], like=x, transB=1)[0] for matrix in matrices]
    product = products[0] if narrow else emit.add(*products)
    high, low = emit("", "Split", [product], 2, like=x, axis=0, num_outputs=2)
    product = emit.add(high, low)
    return emit.nodes, [product if is_matrix(x) else emit.reshape(product, 1, _rows(x), N)]


def _rows(x: ir.Value) -> int:
    """Rows of x [1, T, K] or [rows, K], -1 where their number is not known."""
    size = x.shape[-2] if x.shape is not None else None
    return size if isinstance(size, int) else -1


def _dequantized(emit: Emitter, value: ir.Value, weight: Weight, format: GroupFormat, context: PassContext) -> ir.Value:
    """The weight in the activation dtype, from codes and scales; turned, [in, out], where it is int4."""
    name = value.name or ""
    if format.format == FP8:
        scales = Fp8Scales(weight, context.activation)
        parts = [add_weight(emit.graph, f"{name}.codes", Fp8Codes(weight)), add_weight(emit.graph, f"{name}.scales", scales)]
        attributes = {"axis": 0}
    else:
        ensure_whole_blocks(weight, format, name)
        turned = format.format == INT4
        parts = quantized_parts(emit.graph, name, weight, format, context.activation, turned=turned)
        attributes = {"axis": 0 if turned else 1, "block_size": format.block}
    return emit("", "DequantizeLinear", parts, dtype=context.activation, **attributes)[0]


def lower_picture_attention(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """picture_attention as on the targets with standard operators; of fp32, operands in two parts."""
    return pictures.attention(graph, node, shared, SplitEmitter if _exact(context) else Emitter)


LOWERINGS: dict[tuple[str, str], Lowering] = {
    ("picture_attention", "masked_parts"): lower_picture_attention,
    ("place_features", "where"): pictures.lower_place_features,
    ("gated_delta_net", "fused_layers"): lower_delta_net,
    ("gated_delta_net", "plugin"): lower_delta_net_plugin,
    ("gated_attention", "native"): lower_attention,
    ("gated_attention", "decomposed"): lower_decomposed_attention,
    ("moe", "gathered"): lower_experts,
    ("rms_norm", "rms_normalization"): lower_rms_normalization,
    (LINEAR, "product"): lower_product,
    (LINEAR, "split_product"): lower_split_product,
}


def lower_mixers(model: ir.Model, context: PassContext) -> Outcome:
    """Lower the stateful ops. They regroup the projections that feed them, so linears are lowered after them."""
    return lower_ops(model, context, ("gated_delta_net", "gated_attention"), LOWERINGS)


def lower_simple_ops(model: ir.Model, context: PassContext) -> Outcome:
    """Lower everything else of domain qwen."""
    return lower_ops(model, context, ("moe", "place_features", "rms_norm", LINEAR), LOWERINGS)


def lower_tower(model: ir.Model, context: PassContext) -> Outcome:
    """Lower the ops of a vision tower."""
    return lower_ops(model, context, ("picture_attention", LINEAR), LOWERINGS)
