"""A lowered graph as TensorRT's parser reads it: weights as inputs of the network, or as initializers whose bytes are given beside it."""

from __future__ import annotations

import onnx
import onnx_ir as ir


def parser_model(model: ir.Model, *, bound: bool) -> onnx.ModelProto:
    """The model with its written weights as external initializers; with `bound` these are inputs instead, after the graph's own. Small
    constants stay in the graph."""
    proto: onnx.ModelProto = ir.to_proto(model)
    # The parser reads the location of an external initializer, and the bytes come from elsewhere.
    if not bound:
        return proto
    graph, kept = proto.graph, []
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            kept.append(tensor)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return proto
