"""picture_attention on our own CUDA kernels, which add the bias of the projection and turn queries and keys themselves."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext, sole_user
from qwen_export.graphs.weights.expression import weight_of
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.onnxruntime.picture_attention_builtin import lower_picture_attention
from qwen_export.plugins.rewrite import Replacement

_MOST_VALUES = 128


def lower_picture_attention_plugin(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """Given  y = picture_attention(Add(x, b), cos, sin)          nothing else reads the sum
    Result y = qwen.native::PictureAttention(x, b, cos, sin), or what ONNX Runtime has for heads that the kernel does not take"""
    qkv, cos, sin = node.inputs
    heads = node.attributes.get_int("heads")
    width = qkv.shape[2] if qkv is not None and qkv.shape is not None else None
    if qkv is None or not isinstance(width, int):
        raise TypeError(f"{node.name} has no inputs of known width")
    D = width // (3 * heads)
    if D % 8 or D > _MOST_VALUES:
        return lower_picture_attention(graph, node, context, shared)
    product, bias = with_bias(qkv) or (qkv, None)
    emit = Emitter(graph, str(node.name), shared)
    (y,) = emit(NATIVE, "PictureAttention", [product, bias, cos, sin], like=qkv, num_heads=heads)
    return emit.nodes, [y]


def with_bias(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The product and the stored bias whose sum `value` is, None where it is something else, or has other readers."""
    add = value.producer()
    if add is None or add.op_type != "Add" or add.domain or sole_user(value) is None:
        return None
    for bias, product in (tuple(add.inputs), tuple(reversed(add.inputs))):
        if product is not None and bias is not None and weight_of(bias) is not None and bias.shape is not None and len(bias.shape) == 1:
            return product, bias
    return None
