"""The residual addition becomes part of the product before it."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext, sole_user
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import is_linear
from qwen_export.plugins.onnxruntime.linear_plugin import LINEAR, is_native, put, with_residual


def absorb_residual(model: ir.Model, context: PassContext) -> Outcome:
    """Given  s = Add(a, linear(x, W))                      nothing else reads the product
    Result s = qwen.native::Linear(x, W, residual=a)"""
    if context.choices["linear"].name != "native_linear":
        return Outcome.nothing(f"products are lowered to {context.choices['linear'].name}, which adds no residual")
    graph, outcome = model.graph, Outcome()
    for node in list(graph):
        if node.op_type != "Add" or node.domain:
            continue
        for value, other in (tuple(node.inputs), tuple(reversed(node.inputs))):
            product = value.producer() if value is not None else None
            if product is None or value is None or other is None or sole_user(value) is not node:
                continue
            if is_linear(product) or (is_native(product, LINEAR) and (len(product.inputs) < 3 or product.inputs[2] is None)):
                put(graph, node, with_residual(product, other))
                graph.remove(product, safe=True)
                outcome.changed += 1
                break
        else:
            outcome.skip(node, "neither operand is a product that nothing else reads")
    return outcome
