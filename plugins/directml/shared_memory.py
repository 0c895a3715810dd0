"""Which values of a graph DirectML's compiler keeps in the same memory, and which operators it lets write over their input.

Found by running graphs with DirectML 1.15.4 (tests/directml)."""

from __future__ import annotations

import onnx_ir as ir

ELEMENTWISE = frozenset(
    {
        *("Abs", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Neg", "Not"),
        *("QuickGelu", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Tanh", "Cast"),
        *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mul", "Or", "Pow"),
        *("Sub", "Sum", "Where"),
    }
)
"""Operators that may write their result over an input that nothing else reads."""

VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators whose result is their first input."""


def views(value: ir.Value) -> list[ir.Value]:
    """All values in the memory of `value`: what it is a view of, and what are views of that."""
    while (producer := value.producer()) is not None and producer.op_type in VIEWS and producer.inputs[0] is not None:
        value = producer.inputs[0]
    found = [value]
    for one in found:
        found += [node.outputs[0] for node in one.consumers() if node.op_type in VIEWS and node.inputs[0] is one]
    return found


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value or its views; None where there are more, and where one of them is an output of the graph."""
    same = views(value)
    readers = {node for view in same for node in view.consumers() if node.op_type not in VIEWS}
    return readers.pop() if len(readers) == 1 and not any(view.is_graph_output() for view in same) else None


def ancestors(node: ir.Node) -> set[ir.Node]:
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
