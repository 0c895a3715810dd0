"""Running a target's passes: in order, verified after each, dumped on request."""

from __future__ import annotations

import importlib
from pathlib import Path

import onnx_ir as ir

from qwen_export.graphs.passes.check_invariants import verify_graph
from qwen_export.graphs.passes.pass_context import Pass, PassContext
from qwen_export.targets import Target, pass_names


def run_passes(model: ir.Model, target: Target, context: PassContext, dump: Path | None = None) -> None:
    """Lower `model` in place. `dump` gets one text file per phase, NN_name.txt."""
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
    phases: list[tuple[str, Pass | None]] = [("captured", None)]
    for path, name in zip(target.passes, pass_names(target), strict=True):
        module = importlib.import_module(f"qwen_export.{path.removesuffix(f':{name}')}")
        phases.append((name, getattr(module, name)))
    for number, (name, rewrite) in enumerate(phases):
        if rewrite is not None:
            rewrite(model, context)
        verify_graph(model, name)
        if dump is not None:
            (dump / f"{number:02d}_{name}.txt").write_text(print_graph(model.graph), encoding="utf-8")


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
