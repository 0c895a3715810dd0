"""Pictures in operators of the standard: the tower of one size of picture, and features in the place of embeddings."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.bundle_contract import REAL_TOKENS
from qwen_export.graphs.passes.pass_context import PassContext, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.plugins.decompose.decompose_gelu import emit_gelu
from qwen_export.plugins.decompose.decompose_picture_attention import emit_picture_attention
from qwen_export.plugins.emitter import Emitter, Shared, static_shape
from qwen_export.plugins.rewrite import Replacement


def lower_picture_attention(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """picture_attention -> rotation, products and a masked softmax, queries in parts. The graph gets an input `real_tokens`."""
    return attention(graph, node, shared, Emitter)


def attention(graph: ir.Graph, node: ir.Node, shared: Shared, kind: type[Emitter]) -> Replacement:
    """The same by an emitter of some kind."""
    qkv, cos, sin = node.inputs
    if qkv is None or cos is None or sin is None:
        raise TypeError("picture_attention has an input that is missing")
    emit = kind(graph, str(node.name), shared)
    count = emit.shared(REAL_TOKENS, lambda: _new_input(graph))
    return emit.nodes, [emit_picture_attention(emit, qkv, cos, sin, count, node.attributes.get_int("heads"))]


def _new_input(graph: ir.Graph) -> ir.Value:
    value = ir.Value(name=REAL_TOKENS, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT32))
    graph.inputs.append(value)
    return value


def lower_place_features(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """Given  y = place_features(x, features, places)           x [1,T,H], features [T,H], places i32[T]
    Result Where(places > 0, features, x)"""
    x, features, places = node.inputs
    if x is None or features is None or places is None:
        raise TypeError("place_features has an input that is missing")
    T, H = static_shape(features)
    emit = Emitter(graph, "place_features", shared)
    (placed,) = emit("", "Greater", [emit.reshape(places, 1, T, 1), emit.positions(1)], dtype=ir.DataType.BOOL)
    (y,) = emit("", "Where", [placed, emit.cast(emit.reshape(features, 1, T, H), x.dtype or ir.DataType.FLOAT), x], like=x)
    return emit.nodes, [y]


def decompose_gelu(model: ir.Model, context: PassContext) -> Outcome:
    """Given  Gelu(x)
    Result simple operators"""
    graph, outcome = model.graph, Outcome()
    for node in [node for node in graph if node.op_type == "Gelu" and not node.domain]:
        if node.inputs[0] is None:
            raise TypeError("Gelu has no input")
        emit = Emitter(graph, str(node.name))
        y = emit_gelu(emit, node.inputs[0], tanh=node.attributes.get_string("approximate", "none") == "tanh")
        y.shape = node.outputs[0].shape
        replace_node(graph, node, emit.nodes, [y])
        outcome.changed += 1
    return outcome
