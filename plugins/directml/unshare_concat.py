"""A defect of DirectML's graph compiler, and the rewrite around it.

Concat does not copy: its inputs are computed in place, as parts of its result. The compiler then lets an elementwise operator write over
that result when nothing else reads it, and forgets that something else may read one of the parts. With p = MatMul(x, w),
c = Concat(old, p) and e = Exp(c), the output p of the graph has the values of exp(p). Seen with DirectML 1.15.4 (tests/directml).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qwen_export.errors import REPORT, CaptureError
from qwen_export.graphs.passes.pass_context import PassContext, new_node
from qwen_export.graphs.passes.pass_outcome import Outcome

# Operators that the compiler lets write over their input.
ELEMENTWISE = frozenset(
    {
        *("Abs", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Neg", "Not"),
        *("QuickGelu", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Tanh", "Cast"),
        *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mul", "Or", "Pow"),
        *("Sub", "Sum", "Where"),
    }
)
# Operators whose result is the memory of their input.
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Hazard:
    """`concat` takes `part`, which `readers` (and the graph's outputs, with `is_output`) read after `writer` has written over it."""

    concat: ir.Node
    part: ir.Value
    writer: ir.Node
    readers: tuple[ir.Node, ...]
    is_output: bool

    def __str__(self) -> str:
        also = ", ".join(
            [*(["the graph's outputs"] if self.is_output else []), *(f"{n.op_type} {n.name or ''}".strip() for n in self.readers)]
        )
        return f"{self.part.name} is joined by {self.concat.name or 'Concat'} under {self.writer.op_type}, and read by {also}"


def hazards(graph: ir.Graph) -> Iterator[Hazard]:
    """Every value of the graph that DirectML would overwrite before its last reader."""
    for concat in graph:
        if concat.op_type != "Concat" or concat.domain:
            continue
        writer = _only_reader(concat.outputs[0])
        if writer is None or writer.op_type not in ELEMENTWISE:
            continue
        before = _ancestors(concat)
        for part in dict.fromkeys(concat.inputs):
            if part is None or part.is_initializer():
                continue
            views = _views(part)
            readers = {node: None for view in views for node in view.consumers() if node is not concat and node not in before}
            later = tuple(node for node in readers if node.op_type not in _VIEWS)
            is_output = any(view.is_graph_output() for view in views)
            if later or is_output:
                yield Hazard(concat, part, writer, later, is_output)


def unshare_concat(model: ir.Model, context: PassContext) -> Outcome:
    """Given  c = Concat(..., p, ...), read by one elementwise operator alone; p is an output of the graph or has another reader
    Result the same, and outputs and readers take p from Split(c): c has two readers then, and nothing writes over it

    A node that an input of the Concat is computed from has read p by then, and keeps it. Raises CaptureError where the size of a part is
    not known."""
    graph, outcome = model.graph, Outcome()
    found: dict[ir.Node, list[ir.Value]] = {}
    for hazard in hazards(graph):
        found.setdefault(hazard.concat, []).append(hazard.part)
    for concat, parts in found.items():
        before = _ancestors(concat)
        axis = concat.attributes.get_int("axis")
        sizes = [_size(model, value, axis) for value in concat.inputs]
        split = _split(graph, concat, sizes, axis)
        for part in parts:
            taken = split.outputs[list(concat.inputs).index(part)]
            taken.type, taken.shape = part.type, part.shape
            for view in _views(part):
                _take(graph, view, taken, [node for node in view.consumers() if node is not concat and node not in before])
            outcome.changed += 1
    if found:
        graph.sort()
    return outcome


def _take(graph: ir.Graph, view: ir.Value, taken: ir.Value, readers: list[ir.Node]) -> None:
    """Let `readers` and the graph's outputs have `taken` instead of `view`, a value of the same memory."""
    readers = [node for node in readers if node.op_type not in _VIEWS]
    if not readers and not view.is_graph_output():
        return
    if view.shape != taken.shape:
        taken = _reshape(graph, taken, view)
    for node in readers:
        for index, value in enumerate(node.inputs):
            if value is view:
                node.replace_input_with(index, taken)
    if view.is_graph_output():
        taken.name, view.name = view.name, f"{view.name}.part"
        for index, value in enumerate(graph.outputs):
            if value is view:
                graph.outputs[index] = taken


def _reshape(graph: ir.Graph, taken: ir.Value, view: ir.Value) -> ir.Value:
    if view.shape is None or not view.shape.is_static():
        raise CaptureError("the shape of a view of a Concat's input is unknown", where=str(view.name), got=view.shape, fix=REPORT)
    sizes = list(view.shape.numpy())
    node = new_node("", "Reshape", [taken, _ints(graph, sizes)], like=taken)
    node.name = f"{taken.name}.as.{view.name}"
    node.outputs[0].name, node.outputs[0].shape = f"{node.name}.0", ir.Shape(sizes)
    producer = taken.producer()
    if producer is None:
        raise TypeError("a part of a Concat has no Split")
    graph.insert_after(producer, node)
    return node.outputs[0]


def _ints(graph: ir.Graph, values: list[int]) -> ir.Value:
    """An int64 vector, under the name that emitters give it."""
    name = "ints_" + "_".join(str(value).replace("-", "m") for value in values)
    if name not in graph.initializers:
        tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
        graph.register_initializer(ir.Value(name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(tensor.dtype), const_value=tensor))
    return graph.initializers[name]


def _split(graph: ir.Graph, concat: ir.Node, sizes: list[int], axis: int) -> ir.Node:
    """The inputs of a Concat out of its result."""
    c = concat.outputs[0]
    split = new_node("", "Split", [c, _ints(graph, sizes)], len(sizes), like=c, axis=axis)
    split.name = f"{concat.name}.parts"
    for i, value in enumerate(split.outputs):
        value.name = f"{split.name}.{i}"
    graph.insert_after(concat, split)
    return split


def _size(model: ir.Model, value: ir.Value | None, axis: int) -> int:
    if value is not None and value.shape is None:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    size = value.shape[axis] if value is not None and value.shape is not None else None
    if not isinstance(size, int):
        raise CaptureError("the size of a Concat's input is unknown", where=str(value and value.name), got=size, fix=REPORT)
    return size


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value or its views; None where there are more, and where one of them is an output of the graph."""
    views = _views(value)
    readers = {node for view in views for node in view.consumers() if node.op_type not in _VIEWS}
    return readers.pop() if len(readers) == 1 and not any(view.is_graph_output() for view in views) else None


def _views(value: ir.Value) -> list[ir.Value]:
    """All values in the memory of `value`: what it is a view of, and what are views of that."""
    while (producer := value.producer()) is not None and producer.op_type in _VIEWS and producer.inputs[0] is not None:
        value = producer.inputs[0]
    found = [value]
    for one in found:
        found += [node.outputs[0] for node in one.consumers() if node.op_type in _VIEWS and node.inputs[0] is one]
    return found


def _ancestors(node: ir.Node) -> set[ir.Node]:
    """The nodes that run before `node` in any order."""
    found: set[ir.Node] = set()
    todo = [node]
    while todo:
        for value in todo.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer not in found:
                found.add(producer)
                todo.append(producer)
    return found
