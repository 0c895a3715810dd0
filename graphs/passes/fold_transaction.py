"""A build without speculation: every call commits all its tokens, so nothing is ever pending."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.models.model_state import PENDING
from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome

_CONTROLS = ("accepted", "commit", "hidden")


def fold_transaction(model: ir.Model, context: PassContext) -> Outcome:
    """Given  y, h', S' = gated_delta_net(..., h, S, pending_qkv, pending_b, pending_a, accepted, commit)
    Result y, h', S' = gated_delta_net(..., h, S)          meaning P = 0, accepted = 0, commit = T

    Pending tensors, transaction controls and the hidden states, which only a draft head reads, leave the graph's signature."""
    if context.speculation:
        return Outcome.nothing("the build has speculation: tokens may be pending")
    graph, outcome = model.graph, Outcome()
    keep = gated_delta_net.inputs.index(PENDING[0])
    for node in graph:
        if node.domain == DOMAIN and node.op_type == gated_delta_net.name:
            for i in range(keep, len(node.inputs)):
                node.replace_input_with(i, None)
            node.resize_inputs(keep)
            outcome.changed += 1
    for values in (graph.inputs, graph.outputs):
        for value in list(values):
            key = (value.name or "").removesuffix(".next").rsplit(".", 1)[-1]
            if key in PENDING or value.name in _CONTROLS:
                values.remove(value)
                value.name = (value.name or "").removesuffix(".next").replace(".pending_", ".")
    if not outcome.changed:
        return Outcome.nothing("the graph has no DeltaNet layer")
    return outcome
