"""The ops of domain qwen in native layers of TensorRT, as the ONNX graph that its parser reads."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.errors import ConfigError
from qwen_export.graphs.passes.context import PassContext
from qwen_export.graphs.passes.recognise_linear import LINEAR
from qwen_export.graphs.quantization.plan import STORED, GroupFormat
from qwen_export.graphs.weights.expression import FirstRows, Weight, add_weight, weight_of
from qwen_export.plugins.decompose import gated_delta_net as delta_net
from qwen_export.plugins.decompose.batched_chunks import batched_chunks
from qwen_export.plugins.decompose.delta_rule import delta_rule
from qwen_export.plugins.decompose.emitter import Emitter
from qwen_export.plugins.decompose.reduced_step import reduced_step
from qwen_export.plugins.onnxruntime.common import layer_prefix
from qwen_export.plugins.ops.gated_delta_net import gated_delta_net
from qwen_export.plugins.standard.lowerings import Lowering, Shared, attention_parts, lower_ops, lower_rms_normalization
from qwen_export.plugins.tensorrt import experts
from qwen_export.plugins.tensorrt.attention import emit_native_attention
from qwen_export.plugins.tensorrt.quantized import BlockCodes, BlockScales, Fp8Codes, Fp8Scales


def lower_delta_net(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> tuple[list[ir.Node], list[ir.Value]]:
    """gated_delta_net -> one token: sums over the state; a verify: the chunk form; a prompt: all chunks at once, one product per chunk in
    sequence. Everything fp32 between the projections."""
    sizes = delta_net.Sizes.of(context.config, context.static.T, context.static.P)
    emit = Emitter(graph, f"{layer_prefix(node)}.linear_attn", shared)
    given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    if sizes.P:
        rule = delta_rule
    elif sizes.T == 1:
        rule = reduced_step
    else:
        rule = batched_chunks(context.static.chunk)
    results = delta_net.emit_gated_delta_net(emit, given, sizes, node.attributes.get_float("eps"), context.activation, rule)
    return emit.nodes, list(results)


def lower_attention(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> tuple[list[ir.Node], list[ir.Value]]:
    """gated_attention -> RMSNormalization, RotaryEmbedding, TensorScatter, Attention."""
    return _attention(graph, node, context, shared, layer=True)


def lower_decomposed_attention(
    graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared
) -> tuple[list[ir.Node], list[ir.Value]]:
    """The same with products and a softmax in the place of Attention."""
    return _attention(graph, node, context, shared, layer=False)


def _attention(
    graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared, *, layer: bool
) -> tuple[list[ir.Node], list[ir.Value]]:
    emit, given, q, gate, sizes = attention_parts(graph, node, context, shared)
    eps = context.config.rms_norm_eps
    return emit.nodes, list(emit_native_attention(emit, given, q, gate, sizes, eps, context.activation, layer=layer))


def lower_experts(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> tuple[list[ir.Node], list[ir.Value]]:
    """moe -> TopK, gathered matrices, batched products."""
    x, logits, gate_up, down = node.inputs
    if x is None or logits is None or gate_up is None or down is None:
        raise TypeError("moe has an input that is missing")
    emit = Emitter(graph, (gate_up.name or "experts").removesuffix(".gate_up_proj"), shared)
    E, H, width = (int(size) for size in down.shape or ())
    sizes = experts.Sizes(context.static.T, H, E, node.attributes.get_int("top_k"), width)
    return emit.nodes, [experts.emit_experts(emit, x, logits, gate_up, down, sizes)]


def lower_product(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> tuple[list[ir.Node], list[ir.Value]]:
    """linear -> Gemm over the weight as the checkpoint has it, [out, in]; quantised: DequantizeLinear before it."""
    x, value = node.inputs
    weight = weight_of(value)
    if x is None or value is None or weight is None:
        raise TypeError("a linear has no stored weight")
    emit = Emitter(graph, (value.name or "linear").removesuffix(".weight"), shared)
    N, K = weight.shape
    matrix = _matrix(emit, value, weight, context)
    (product,) = emit("", "Gemm", [emit.reshape(x, -1, K), matrix], like=x, transB=1)
    rows = x.shape[1] if x.shape is not None and isinstance(x.shape[1], int) else -1
    return emit.nodes, [emit.reshape(product, 1, rows, N)]


def _matrix(emit: Emitter, value: ir.Value, weight: Weight, context: PassContext) -> ir.Value:
    """The weight in the activation dtype, dequantised where the plan quantises it."""
    format, name = _format(weight, context), value.name or ""
    if format.format == STORED:
        return value
    whole = weight.of if isinstance(weight, FirstRows) else weight
    block = format.block if format.quant is not None else 1
    if whole.shape[1] % block:
        raise ConfigError(
            "TensorRT dequantises whole blocks only",
            where=name,
            got=f"rows of {whole.shape[1]} values",
            expected=f"a multiple of {block}",
            fix="Give the matrix another block, or format = \"stored\", in the precision plan.",
        )
    if format.quant is not None:
        codes: Weight = BlockCodes(whole, format.quant, format.method)
        scales: Weight = BlockScales(whole, format.quant, format.method, context.activation)
        attributes = {"axis": 1, "block_size": block}
    else:
        codes, scales, attributes = Fp8Codes(whole), Fp8Scales(whole, context.activation), {"axis": 0}
    if isinstance(weight, FirstRows):  # the front of what is stored once
        codes, scales = FirstRows(codes, weight.count), FirstRows(scales, weight.count)
    inputs = [add_weight(emit.graph, f"{name}.{format.format}", codes), add_weight(emit.graph, f"{name}.scale", scales)]
    return emit("", "DequantizeLinear", inputs, dtype=context.activation, **attributes)[0]


def _format(weight: Weight, context: PassContext) -> GroupFormat:
    """The format that the plan gives to all parts of a weight, or "stored"."""
    if context.quantization is None:
        return GroupFormat()
    formats = {context.quantization.of(name) for name in weight.stored()}
    return formats.pop() if len(formats) == 1 else GroupFormat()


LOWERINGS: dict[tuple[str, str], Lowering] = {
    ("gated_delta_net", "fused_layers"): lower_delta_net,
    ("gated_attention", "native"): lower_attention,
    ("gated_attention", "decomposed"): lower_decomposed_attention,
    ("moe", "gathered"): lower_experts,
    ("rms_norm", "rms_normalization"): lower_rms_normalization,
    (LINEAR, "product"): lower_product,
}


def lower_mixers(model: ir.Model, context: PassContext) -> int:
    """Lower the stateful ops. They regroup the projections that feed them, so linears are lowered after them."""
    return lower_ops(model, context, ("gated_delta_net", "gated_attention"), LOWERINGS)


def lower_simple_ops(model: ir.Model, context: PassContext) -> int:
    """Lower everything else of domain qwen."""
    return lower_ops(model, context, ("moe", "rms_norm", LINEAR), LOWERINGS)
