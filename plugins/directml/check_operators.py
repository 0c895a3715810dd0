"""Every node of the final graph against the table of DirectML's kernels, by version and element type."""

from __future__ import annotations

import onnx
import onnx.defs
import onnx_ir as ir

from qwen_export.errors import UnsupportedError
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.plugins.directml.directml_limits import limit
from qwen_export.plugins.directml.directml_operators import DirectmlKernel, operator_table
from qwen_export.plugins.directml.gather_parts import overwritten_parts
from qwen_export.plugins.directml.provider_fusions import broken_fusions
from qwen_export.plugins.directml.unshare_concat import hazards

_SHOWN = 5


def check_operators(model: ir.Model, context: PassContext) -> Outcome:
    """Given  a lowered graph
    Result the same. Raises UnsupportedError with node and reason where DirectML would leave a node to the CPU or compute other values,
    and where a shape is dynamic."""
    reasons = [f"{node.op_type} {node.name or ''}: {reason}" for node in model.graph if (reason := refusal(node, context.opset))]
    signature = (*model.graph.inputs, *model.graph.outputs)
    reasons += [f"{v.name}: its shape {v.shape} is not static" for v in signature if v.shape is None or not v.shape.is_static()]
    reasons += [f"{hazard}, after {hazard.writer.op_type} has written over it" for hazard in hazards(model.graph)]
    reasons += [f"{node.op_type} {node.name or ''}: {reason}" for node, reason in broken_fusions(model.graph)]
    reasons += [f"{node.op_type} {node.name or ''}: a part of it may be overwritten" for node in overwritten_parts(model.graph)]
    if reasons:
        more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
        raise UnsupportedError(
            "DirectML cannot run this graph",
            got="; ".join(reasons[:_SHOWN]) + more,
            expected=f"operators of {operator_table().source.split(',')[0]} as of {operator_table().date}",
            fix="Build with another {opset}, or for another {target}.",
        )
    return Outcome.nothing("it only checks")


def refusal(node: ir.Node, opset: int) -> str:
    """Why DirectML does not take the node, "" when it does."""
    table = operator_table()
    operator = table.operators.get((node.domain, node.op_type))
    if operator is None:
        return f"DirectML has no {node.domain or 'ai.onnx'}.{node.op_type}"
    schema = _schema(node, opset)
    version = schema.since_version if schema is not None else 1
    kernel = operator.kernel(version)
    if kernel is None:
        have = ", ".join(str(k.first) for k in operator.kernels)
        return f"opset {opset} means version {version} of it, and DirectML has {have}"
    inputs = operator.inputs or _variables(schema, len(node.inputs), inputs=True)
    outputs = operator.outputs or _variables(schema, len(node.outputs), inputs=False)
    return _wrong_type(node, kernel, inputs, outputs) or limit(node)


def _wrong_type(node: ir.Node, kernel: DirectmlKernel, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> str:
    for variables, values in ((inputs, node.inputs), (outputs, node.outputs)):
        for variable, value in zip(variables, values, strict=False):
            if value is None or not value.name or variable not in kernel.types:
                continue
            kind = value.dtype.name.lower() if value.dtype is not None else "an unknown type"
            if kind not in kernel.types[variable]:
                return f"{value.name} is {kind}, and DirectML takes {', '.join(sorted(kernel.types[variable]))}"
    return ""


def _schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    """The standard's schema; operators that are ONNX Runtime's own have version 1."""
    if node.domain or not onnx.defs.has(node.op_type):
        return None
    return onnx.defs.get_schema(node.op_type, opset)


def _variables(schema: onnx.defs.OpSchema | None, count: int, *, inputs: bool) -> tuple[str, ...]:
    """Type variables of a node's inputs or outputs; the last formal parameter of a variadic operator stands for all that follow."""
    if schema is None:
        return ()
    formals = [formal.type_str for formal in (schema.inputs if inputs else schema.outputs)]
    return tuple(formals[min(i, len(formals) - 1)] for i in range(count)) if formals else ()
