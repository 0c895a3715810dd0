"""A second defect of DirectML's graph compiler, and the rewrite around it.

The results of Slice and Split are in the memory of the value that they are parts of. Where nothing else reads that value, the compiler lets
an elementwise operator write over a part, as if the part were a value of its own. With m = MatMul(x, w), g, u = Split(m) along the last
axis and y = Sigmoid(g) * u, y has other values; where one part alone is read, the session cannot be opened ("Invalid parameter"). Not
every such graph is wrong. Seen with DirectML 1.15.4 (tests/directml).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext, new_node, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.plugins.directml.shared_memory import ELEMENTWISE, only_reader, views
from qwen_export.plugins.directml.static_values import size_along
from qwen_export.plugins.emitter import Emitter


def overwritten_parts(graph: ir.Graph) -> Iterator[ir.Node]:
    """Every Slice and Split with a part that an elementwise operator may write over."""
    for node in graph:
        whole = node.inputs[0] if node.op_type in ("Slice", "Split") and not node.domain else None
        if whole is None or views(whole)[0].producer() is None or only_reader(whole) is not node:
            continue
        if any(reader.op_type in ELEMENTWISE for part in node.outputs if (reader := only_reader(part)) is not None):
            yield node


def gather_parts(model: ir.Model, context: PassContext) -> Outcome:
    """Given  Slice or Split of a computed value that nothing else reads, and a part that one elementwise operator alone reads
    Result the parts by Gather, which copies"""
    graph, outcome = model.graph, Outcome()
    for node in list(overwritten_parts(graph)):
        ranges = _split_ranges(model, node) if node.op_type == "Split" else _slice_range(model, node)
        if ranges is None:
            outcome.skip(node, "it cuts along several axes, with steps, or at places that are not constant")
            continue
        axis, cuts = ranges
        gathers: list[ir.Node] = []
        for part, (start, stop) in zip(node.outputs, cuts, strict=True):
            places = Emitter(graph, "").array(f"positions_{start}_to_{stop}", np.arange(start, stop, dtype=np.int64))
            gather = new_node("", "Gather", [node.inputs[0], places], like=part, axis=axis)
            gather.name, gather.outputs[0].shape = f"{node.name or node.op_type}.part{len(gathers)}", part.shape
            gathers.append(gather)
        replace_node(graph, node, gathers, [gather.outputs[0] for gather in gathers])
        graph.remove([gather for gather in gathers if not gather.outputs[0].consumers() and not gather.outputs[0].is_graph_output()])
        outcome.changed += 1
    return outcome


def _split_ranges(model: ir.Model, node: ir.Node) -> tuple[int, list[tuple[int, int]]] | None:
    axis = node.attributes.get_int("axis", 0)
    sizes = _constant(node, 1)
    if sizes is None:
        if len(node.inputs) > 1:
            return None
        size, count = size_along(model, node.inputs[0], axis), len(node.outputs)
        each = -(-size // count)
        sizes = [each] * (count - 1) + [size - each * (count - 1)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return axis, [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _slice_range(model: ir.Model, node: ir.Node) -> tuple[int, list[tuple[int, int]]] | None:
    starts, stops, axes, steps = (_constant(node, index) for index in range(1, 5))
    if starts is None or stops is None or len(starts) != 1 or (axes is None and len(node.inputs) > 3) or (steps or [1]) != [1]:
        return None
    axis = axes[0] if axes else 0
    size = size_along(model, node.inputs[0], axis)
    start, stop, _ = slice(starts[0], stops[0]).indices(size)
    return axis, [(start, stop)]


def _constant(node: ir.Node, index: int) -> list[int] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else [int(one) for one in value.const_value.numpy()]
