"""Shapes and axes that the trace computes from constants become constants: DirectML reads them when it compiles a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome


def fold_shapes(model: ir.Model, context: PassContext) -> Outcome:
    """Given  Constant(), and Concat of constants
    Result initializers"""
    graph, outcome = model.graph, Outcome()
    for node in list(graph):
        if node.domain or node.op_type not in ("Constant", "Concat"):
            continue
        values = _values(node)
        if values is None:
            continue
        out = node.outputs[0]
        tensor = ir.tensor(values, name=out.name)
        made = ir.Value(name=out.name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        out.name = f"{out.name}.folded"
        out.replace_all_uses_with(made)
        graph.register_initializer(made)
        graph.remove(node, safe=True)
        outcome.changed += 1
    return outcome


def _values(node: ir.Node) -> np.ndarray | None:
    """What a node makes, None where that is computed from what a call brings."""
    if node.op_type == "Constant":
        value = next(iter(node.attributes.values())).value
        return value.numpy() if isinstance(value, ir.TensorProtocol) else np.array(value, np.int64)
    parts = [value.const_value if value is not None else None for value in node.inputs]
    if any(part is None or part.dtype != ir.DataType.INT64 for part in parts):
        return None
    return np.concatenate([part.numpy() for part in parts if part is not None])
