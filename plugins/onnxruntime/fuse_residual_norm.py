"""The residual addition and the norm after it as one node."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.ops.rms_norm_op import rms_norm
from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext, new_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.plugins.rewrite import offset_weight


def fuse_residual_norm(model: ir.Model, context: PassContext) -> Outcome:
    """Given  s = Add(a, b);  y = qwen::rms_norm(s, w, eps, offset)
    Result y, _, _, s = com.microsoft::SkipSimplifiedLayerNormalization(a, b, w + offset, epsilon)"""
    graph, outcome = model.graph, Outcome()
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type != rms_norm.name or node.inputs[0] is None:
            continue
        add = node.inputs[0].producer()
        if add is None or add.op_type != "Add" or add.domain:
            outcome.skip(node, f"its input is made by {add.op_type if add is not None else 'no node'}, not by an addition")
            continue
        weight = offset_weight(graph, node)
        fused = new_node(
            MICROSOFT,
            "SkipSimplifiedLayerNormalization",
            [add.inputs[0], add.inputs[1], weight],
            4,
            like=node.outputs[0],
            epsilon=node.attributes.get_float("eps"),
        )
        y, mean, variance, total = fused.outputs
        mean.name = variance.name = ""  # optional outputs, left out
        graph.insert_after(add, fused)
        for old, new in ((node.outputs[0], y), (add.outputs[0], total)):
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            new.shape, new.name = old.shape, old.name
        graph.remove([node, add], safe=True)
        outcome.changed += 1
    return outcome
