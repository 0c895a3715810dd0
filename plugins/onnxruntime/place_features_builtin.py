"""place_features on ScatterND, for any number of features, none included."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.rewrite import Replacement


def lower_place_features(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """Given  y = place_features(x, features, places)           x [B,T,H]
    Result Reshape(ScatterND(Reshape(x, [-1, H]), Unsqueeze(places), features), Shape(x))"""
    x, features, places = node.inputs
    if x is None or features is None or features.shape is None or not isinstance(features.shape[1], int):
        raise TypeError(f"{node.name} has no features of known width")
    emit = Emitter(graph, "place_features", shared)
    rows = emit.reshape(x, -1, features.shape[1])
    (index,) = emit("", "Unsqueeze", [places, emit.ints(-1)], like=places)
    (placed,) = emit("", "ScatterND", [rows, index, features], like=rows)
    (shape,) = emit("", "Shape", [x], dtype=ir.DataType.INT64)
    (y,) = emit("", "Reshape", [placed, shape], like=x)
    return emit.nodes, [y]
