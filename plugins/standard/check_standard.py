"""A graph for any runtime has nothing but operators of the ONNX standard, and neither loops nor branches."""

from __future__ import annotations

import onnx.defs
import onnx_ir as ir

from qwen_export.errors import REPORT, CaptureError
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.runtimes.backends.tensorrt.delta_net_plugin import OWN

_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")


def check_standard(model: ir.Model, context: PassContext) -> Outcome:
    """Given  a lowered graph
    Result the same. Raises CaptureError for a node that the standard does not have at the graph's opset, and for control flow."""
    plugged = context.choices["gated_delta_net"].name == "plugin"
    for node in model.graph:
        known = (not node.domain and onnx.defs.has(node.op_type, context.opset)) or (plugged and (node.domain, node.op_type) in OWN)
        if not known or node.op_type in _CONTROL_FLOW:
            raise CaptureError(
                "a graph of standard operators has another node",
                where=node.name or "",
                got=f"{node.domain or 'ai.onnx'}.{node.op_type}",
                expected=f"operators of opset {context.opset}, without control flow",
                fix=REPORT,
            )
    return Outcome.nothing("it only checks")
