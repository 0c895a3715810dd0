"""Nodes and initializers that nothing reads leave the graph."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome


def remove_dead(model: ir.Model, context: PassContext) -> Outcome:
    """Given  nodes and initializers without a path to an output
    Result the graph without them; graph inputs stay"""
    before = len(model.graph) + len(model.graph.initializers)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    return Outcome(before - len(model.graph) - len(model.graph.initializers))
