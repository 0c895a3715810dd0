"""The graph's version of the standard. What the lowerings emit means the same from opset 18 on."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome


def stamp_opset(model: ir.Model, context: PassContext) -> Outcome:
    """Given  a lowered graph
    Result the same, of the opset of the build, in the oldest file format that has it"""
    model.opset_imports[""] = context.opset
    opsets = [onnx.helper.make_opsetid("", context.opset)]
    model.ir_version = onnx.helper.find_min_ir_version_for(opsets)
    return Outcome(1)
