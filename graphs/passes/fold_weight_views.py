"""Views of initializers become initializers of that shape."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.weights.expression import Reshaped, add_weight, weight_of

_VIEWS = ("Squeeze", "Unsqueeze", "Reshape")


def fold_weight_views(model: ir.Model, context: PassContext) -> Outcome:
    """Given  v = Squeeze(w, axes)         w an initializer
    Result v = initializer `w.view`, of the shape that the op would have made"""
    graph, outcome = model.graph, Outcome()
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        weight = weight_of(source)
        if node.domain or node.op_type not in _VIEWS or weight is None or source is None:
            continue
        out = node.outputs[0]
        if out.shape is None or not out.shape.is_static():
            outcome.skip(node, "the shape of the view is not known")
            continue
        view = add_weight(graph, f"{source.name}.view", Reshaped(weight, out.shape.numpy()))
        out.replace_all_uses_with(view)
        graph.remove(node, safe=True)
        outcome.changed += 1
    return outcome
