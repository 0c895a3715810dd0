"""picture_attention on MultiHeadAttention, which goes through keys in blocks: memory is linear in the number of patches."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.rewrite import Replacement


def lower_picture_attention(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """Given  y = picture_attention(qkv, cos, sin)
    Result Split, RotaryEmbedding x2, MultiHeadAttention; Reshape of cos and sin, once"""
    qkv, cos, sin = node.inputs
    heads = node.attributes.get_int("heads")
    width = qkv.shape[2] if qkv is not None and qkv.shape is not None else None
    if qkv is None or cos is None or sin is None or not isinstance(width, int):
        raise TypeError(f"{node.name} has no inputs of known width")
    d = width // 3
    half = d // heads // 2
    emit = Emitter(graph, str(node.name), shared)

    def table(value: ir.Value) -> ir.Value:
        return emit.shared(f"flat.{value.name}", lambda: emit.cast(emit.reshape(value, -1, half), context.activation))

    def turned(value: ir.Value) -> ir.Value:
        inputs = [value, emit.ints(0), table(cos), table(sin)]
        return emit(MICROSOFT, "RotaryEmbedding", inputs, like=value, num_heads=heads, interleaved=0)[0]

    q, k, v = emit.split(qkv, (d, d, d), 2)
    (y,) = emit(MICROSOFT, "MultiHeadAttention", [turned(q), turned(k), v], like=v, num_heads=heads)
    return emit.nodes, [y]
