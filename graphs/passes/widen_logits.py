"""Logits leave the graph in fp32: sampling needs it, and the device converts faster than the host."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext, new_node
from qwen_export.graphs.passes.pass_outcome import Outcome


def widen_logits(model: ir.Model, context: PassContext) -> Outcome:
    """Given  output logits: fp16 or bf16
    Result output logits: fp32 = Cast(logits)"""
    graph = model.graph
    logits = graph.outputs[0]
    if logits.name != "logits":
        return Outcome.nothing("the graph has no logits")
    if logits.dtype == ir.DataType.FLOAT:
        return Outcome.nothing("the logits are fp32 already")
    cast = new_node("", "Cast", [logits], dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    graph.append(cast)
    wide = cast.outputs[0]
    wide.shape, wide.name, logits.name = logits.shape, logits.name, "logits_narrow"
    graph.outputs[0] = wide
    return Outcome(1)
