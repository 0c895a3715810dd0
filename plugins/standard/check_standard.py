"""A graph for any runtime has nothing but operators of the ONNX standard and functions of these, and neither loops nor branches."""

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
    Result the same. Raises CaptureError for a node that neither the standard has at the graph's opset nor the model defines, and for
           control flow."""
    own = OWN if context.choices["gated_delta_net"].name == "plugin" else ()
    defined = {(domain, name) for domain, name, _ in model.functions} | set(own)
    for node in (*model.graph, *(node for function in model.functions.values() for node in function)):
        known = (node.domain, node.op_type) in defined or (not node.domain and onnx.defs.has(node.op_type, context.opset))
        if not known or node.op_type in _CONTROL_FLOW:
            raise CaptureError(
                "a graph of standard operators has another node",
                where=node.name or "",
                got=f"{node.domain or 'ai.onnx'}.{node.op_type}",
                expected=f"operators of opset {context.opset}, without control flow",
                fix=REPORT,
            )
    return Outcome.nothing("it only checks")
