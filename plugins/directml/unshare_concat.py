"""A defect of DirectML's graph compiler, and the rewrite around it.

Concat does not copy: its inputs are computed in place, as parts of its result. The compiler then lets an elementwise operator write over
that result when nothing else reads it, and forgets that something else may read one of the parts. With p = MatMul(x, w),
c = Concat(old, p) and e = Exp(c), the output p of the graph has the values of exp(p). Seen with DirectML 1.15.4 (tests/directml).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qwen_export.errors import REPORT, CaptureError
from qwen_export.graphs.passes.pass_context import PassContext, new_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.plugins.directml.shared_memory import ELEMENTWISE, VIEWS, ancestors, only_reader, views
from qwen_export.plugins.directml.static_values import size_along
from qwen_export.plugins.emitter import Emitter


@dataclass(frozen=True)
class Hazard:
    """`concat` takes `part`, and is `joined` itself or one of the Concats that it takes. `readers` (and the graph's outputs, with
    `is_output`) may read `part` after `writer` has written over `joined`."""

    joined: ir.Node
    concat: ir.Node
    part: ir.Value
    writer: ir.Node
    readers: tuple[ir.Node, ...]
    is_output: bool

    def __str__(self) -> str:
        readers = [f"{node.op_type} {node.name or ''}".strip() for node in self.readers]
        also = ", ".join([*(["the graph's outputs"] if self.is_output else []), *readers])
        return f"{self.part.name} is joined by {self.concat.name or 'Concat'} under {self.writer.op_type}, and read by {also}"


def hazards(graph: ir.Graph) -> Iterator[Hazard]:
    """Every value of the graph that DirectML would overwrite before its last reader."""
    for node in graph:
        writer = only_reader(node.outputs[0]) if _is_concat(node) else None
        if writer is None or writer.op_type not in ELEMENTWISE:
            continue
        before = ancestors(node)
        for concat in _joined(node):
            for part in dict.fromkeys(concat.inputs):
                if part is None or part.is_initializer():
                    continue
                same = views(part)
                readers = {user: None for view in same for user in view.consumers() if user is not concat and user not in before}
                later = tuple(user for user in readers if user.op_type not in VIEWS and user is not node)
                is_output = any(view.is_graph_output() for view in same)
                if later or is_output:
                    yield Hazard(node, concat, part, writer, later, is_output)


def unshare_concat(model: ir.Model, context: PassContext) -> Outcome:
    """Given  c = Concat(..., p, ...), read by one elementwise operator alone; p is an output of the graph or has another reader
    Result the same, and outputs and readers take p from Split(c): c has two readers then, and nothing writes over it

    Where c is a part of another Concat, it is read back in its turn. A node that an input of the Concat is computed from has read p
    by then, and keeps it. Raises CaptureError where the size of a part is not known."""
    graph, outcome = model.graph, Outcome()
    while hazard := next(hazards(graph), None):
        concat, part = hazard.concat, hazard.part
        before, axis = ancestors(hazard.joined), concat.attributes.get_int("axis")
        split = _split(graph, concat, [size_along(model, value, axis) for value in concat.inputs], axis)
        taken = split.outputs[list(concat.inputs).index(part)]
        taken.type, taken.shape = part.type, part.shape
        kept = {concat, hazard.joined, *before}
        for view in views(part):
            _take(graph, view, taken, [node for node in view.consumers() if node not in kept])
        outcome.changed += 1
    if outcome.changed:
        graph.sort()
    return outcome


def _is_concat(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Concat" and not node.domain


def _joined(concat: ir.Node) -> list[ir.Node]:
    """A Concat and those that it takes, also as views: all are in its memory."""
    found = [concat]
    for one in found:
        for value in one.inputs:
            producer = views(value)[0].producer() if value is not None else None
            if producer is not None and _is_concat(producer) and producer not in found:
                found.append(producer)
    return found


def _take(graph: ir.Graph, view: ir.Value, taken: ir.Value, readers: list[ir.Node]) -> None:
    """Let `readers` and the graph's outputs have `taken` instead of `view`, a value of the same memory."""
    readers = [node for node in readers if node.op_type not in VIEWS]
    if not readers and not view.is_graph_output():
        return
    if view.shape != taken.shape:
        taken = _reshape(graph, taken, view)
    for node in readers:
        for index, value in enumerate(node.inputs):
            if value is view:
                node.replace_input_with(index, taken)
    if view.is_graph_output():
        taken.name, view.name = view.name, taken.name  # a value may change places more than once
        for index, value in enumerate(graph.outputs):
            if value is view:
                graph.outputs[index] = taken


def _reshape(graph: ir.Graph, taken: ir.Value, view: ir.Value) -> ir.Value:
    if view.shape is None or not view.shape.is_static():
        raise CaptureError("the shape of a view of a Concat's input is unknown", where=str(view.name), got=view.shape, fix=REPORT)
    sizes = list(view.shape.numpy())
    node = new_node("", "Reshape", [taken, Emitter(graph, "").ints(*sizes)], like=taken)
    node.name = f"{taken.name}.as.{view.name}"
    node.outputs[0].name, node.outputs[0].shape = f"{node.name}.0", ir.Shape(sizes)
    producer = taken.producer()
    if producer is None:
        raise TypeError("a part of a Concat has no Split")
    graph.insert_after(producer, node)
    return node.outputs[0]


def _split(graph: ir.Graph, concat: ir.Node, sizes: list[int], axis: int) -> ir.Node:
    """The inputs of a Concat out of its result."""
    c = concat.outputs[0]
    name = f"{concat.name or c.name}.parts"
    made = next((node for node in c.consumers() if node.name == name), None)
    if made is not None:
        return made
    split = new_node("", "Split", [c, Emitter(graph, "").ints(*sizes)], len(sizes), like=c, axis=axis)
    split.name = name
    for i, value in enumerate(split.outputs):
        value.name = f"{split.name}.{i}"
    graph.insert_after(concat, split)
    return split
