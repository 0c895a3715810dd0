"""Running a target's passes: in order, the graph verified after each, what must match required, everything dumped on request."""

from __future__ import annotations

import importlib
from pathlib import Path

import onnx_ir as ir

from qwen_export.errors import REPORT, CaptureError
from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.ops.op_table import OPS
from qwen_export.graphs.passes.check_invariants import verify_graph
from qwen_export.graphs.passes.pass_context import Pass, PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import LINEAR
from qwen_export.targets import PassStep, Target

REASONS = "passes.txt"


def run_passes(model: ir.Model, target: Target, context: PassContext, dump: Path | None = None) -> None:
    """Lower `model` in place. Raises CaptureError for a pass that must match and did not, and for a graph that it left broken.

    `dump` gets the graph after each phase, NN_name.txt, and passes.txt: of each pass why it stands where it does, how many places it
    changed, and the candidates that it left, with the reason. It is there for the pass that fails, too."""
    report: list[str] = []
    _dump(model, dump, 0, "captured", report)
    verify_graph(model, "captured")
    for number, step in enumerate(target.passes, 1):
        outcome = _function(step)(model, context)
        report += [f"{number:02d} {step.name}: {step.why}", *(f"     {line}" for line in outcome.lines())]
        _dump(model, dump, number, step.name, report)
        _require(step, outcome)
        verify_graph(model, step.name)
    _require_lowered(model, target)


def _function(step: PassStep) -> Pass:
    module, _, name = step.function.partition(":")
    function: Pass = getattr(importlib.import_module(f"qwen_export.{module}"), name)
    return function


def _require(step: PassStep, outcome: Outcome) -> None:
    left = "; ".join(f"{node}: {reason}" for node, reason in outcome.skipped[:3])
    if step.finds and not outcome.changed and not outcome.idle:
        raise CaptureError(
            "a pass that must match changed nothing", where=step.name, got=left or "no candidate", expected=step.finds, fix=REPORT
        )
    if step.every and outcome.skipped:
        raise CaptureError("a pass left a candidate that it must match", where=step.name, got=left, expected=step.finds, fix=REPORT)


def _require_lowered(model: ir.Model, target: Target) -> None:
    """Raise CaptureError where an op of the family is left that the target's backend does not have."""
    ops = {LINEAR, *OPS}
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type in ops:
            raise CaptureError(
                "an op was lowered by no pass",
                where=f"{target.name}, {node.name or node.outputs[0].name}",
                got=f"{node.domain}.{node.op_type}",
                expected="operators of the target",
                fix=REPORT,
            )


def _dump(model: ir.Model, dump: Path | None, number: int, name: str, report: list[str]) -> None:
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{number:02d}_{name}.txt").write_text(print_graph(model.graph), encoding="utf-8")
        (dump / REASONS).write_text("".join(f"{line}\n" for line in report), encoding="utf-8")


def print_graph(graph: ir.Graph) -> str:
    """One line per input, node and output; weights by name. Stable from run to run."""

    def typed(value: ir.Value) -> str:
        shape = "?" if value.shape is None else ",".join(str(d.value) if isinstance(d, ir.SymbolicDim) else str(d) for d in value.shape)
        return f"{value.name}: {value.dtype.name.lower() if value.dtype is not None else '?'}[{shape}]"

    def attribute(attr: ir.Attr) -> str:
        value = attr.value
        return f"{attr.name}={list(value) if isinstance(value, (list, tuple)) else value}"

    lines = [f"input  {typed(value)}" for value in graph.inputs]
    for node in graph:
        attributes = ", ".join(sorted(attribute(a) for a in node.attributes.values()))
        inputs = ", ".join(value.name or "?" if value is not None else "-" for value in node.inputs)
        outputs = ", ".join(value.name or "-" for value in node.outputs)
        lines.append(f"  {outputs} = {node.domain + '.' if node.domain else ''}{node.op_type}({inputs}){{{attributes}}}")
    lines += [f"output {typed(value)}" for value in graph.outputs]
    return "\n".join(lines) + "\n"
