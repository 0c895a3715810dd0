"""Products of one input become one product, and a tied head gets an input of its own.

A product of one row is bound by the kernel's start as much as by its weight, and TensorRT runs each in turn, on a second stream where it
can, with an event before and behind. It merges such products itself only where the weights are constants.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.passes.pass_context import PassContext, new_node, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import LINEAR, is_linear
from qwen_export.graphs.quantization.precision_plan import GroupFormat
from qwen_export.graphs.weights.expression import Stacked, Weight, add_weight, weight_of

_HEAD = ".head"


def merge_products(model: ir.Model, context: PassContext) -> Outcome:
    """Given  y1 = qwen::linear(x, W1), y2 = qwen::linear(x, W2), ...       weights of one format and type
    Result y1, y2, ... = Split(qwen::linear(x, [W1; W2; ...]), axis=-1)

    Parts are stacked in the order of their names, so that all graphs of a bundle share one stored matrix."""
    graph, outcome = model.graph, Outcome()
    for products in _groups(graph, context):
        weights = {node: _weight(node) for node in products}
        name = _joined([node.inputs[1].name or "" for node in products if node.inputs[1] is not None])
        stacked = add_weight(graph, name, Stacked(tuple(weights.values())))
        first = min(products, key=list(graph).index)
        product = new_node(DOMAIN, LINEAR, [first.inputs[0], stacked], like=first.outputs[0])
        widths = [weight.shape[0] for weight in weights.values()]
        sizes = ir.tensor(widths, dtype=ir.DataType.INT64)
        constant = new_node("", "Constant", [], dtype=ir.DataType.INT64, value=sizes)
        split = new_node("", "Split", [product.outputs[0], constant.outputs[0]], len(products), like=first.outputs[0], axis=-1)
        for node, part in zip(products, split.outputs, strict=True):
            part.shape = node.outputs[0].shape
        shape = first.outputs[0].shape
        if shape is not None:
            product.outputs[0].shape = ir.Shape([*shape[:-1], sum(widths)])
        graph.insert_before(first, [product, constant, split])
        for node, part in zip(products, split.outputs, strict=True):
            replace_node(graph, node, [], [part])
        outcome.changed += len(products)
    return outcome


def own_head(model: ir.Model, context: PassContext) -> Outcome:
    """Given  Gather(W, ids), qwen::linear(x, W)                  embedding and head are one tensor
    Result Gather(W, ids), qwen::linear(x, W')                 W' is W, by another name

    TensorRT lets a product read a matrix [out, in] in place, but copies one that a gather also reads: a transposed copy of the
    whole embedding in every call. Equal weights are stored once, and uploaded once, so the second name costs nothing."""
    graph, outcome = model.graph, Outcome()
    gathered = {node.inputs[0] for node in graph if node.op_type == "Gather" and not node.domain}
    for node in graph:
        value = node.inputs[1] if is_linear(node) else None
        weight = weight_of(value)
        if value is not None and weight is not None and value in gathered:
            node.replace_input_with(1, add_weight(graph, f"{(value.name or '').removesuffix('.weight')}{_HEAD}", weight))
            outcome.changed += 1
    return outcome if outcome.changed else Outcome.nothing("embedding and head are two tensors")


def _groups(graph: ir.Graph, context: PassContext) -> list[list[ir.Node]]:
    """Products that can be one, each group in the order of its weights' names."""
    groups: dict[tuple[ir.Value | None, GroupFormat, ir.DataType], list[ir.Node]] = {}
    for node in graph:
        if is_linear(node):
            weight = _weight(node)
            groups.setdefault((node.inputs[0], context.format_of(weight), weight.dtype), []).append(node)
    return [sorted(group, key=lambda node: str(node.inputs[1] and node.inputs[1].name)) for group in groups.values() if len(group) > 1]


def _weight(node: ir.Node) -> Weight:
    weight = weight_of(node.inputs[1])
    if weight is None:
        raise TypeError(f"{node.name} has no stored weight")
    return weight


def _joined(names: list[str]) -> str:
    """`layers.0.mlp.gate_proj+up_proj` for the names of its parts."""
    plain = [name.removesuffix(".weight") for name in names]
    prefix = plain[0].rpartition(".")[0]
    while prefix and not all(name.startswith(f"{prefix}.") for name in plain):
        prefix = prefix.rpartition(".")[0]
    start = len(prefix) + 1 if prefix else 0
    return plain[0][:start] + "+".join(name[start:] for name in plain)
