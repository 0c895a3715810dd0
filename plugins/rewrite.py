"""Pieces that several lowerings share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import onnx_ir as ir

from qwen_export.bundle_contract import NEXT
from qwen_export.errors import REPORT, CaptureError
from qwen_export.graphs.models.model_state import PENDING
from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.passes.pass_context import PassContext, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import is_linear
from qwen_export.graphs.weights.expression import HeadRows, Offset, StoredWeight, Weight, add_weight, weight_of
from qwen_export.plugins.emitter import Shared

Replacement = tuple[list[ir.Node], list[ir.Value]]
"""The nodes that replace one op, and the values that replace its outputs."""

Lowering = Callable[[ir.Graph, ir.Node, PassContext, Shared], Replacement]
"""Makes the replacement of one op of domain qwen. It adds weights to the graph, and regroups its states; it leaves the nodes alone."""


ONE_FORMAT = "Widen the pattern in [matrices] of {plan_file}, so that it names all of them."
"""The fix of a precision plan that gives different formats to matrices which one kernel reads together."""


def lower_ops(model: ir.Model, context: PassContext, ops: Collection[str], table: Mapping[tuple[str, str], Lowering]) -> Outcome:
    """Replace every node of these ops by what the table's lowering for the choice makes."""
    graph, shared = model.graph, Shared()
    return replace_ops(graph, ops, lambda node: table[node.op_type, context.choices[node.op_type].name](graph, node, context, shared))


def replace_ops(graph: ir.Graph, ops: Collection[str], make: Callable[[ir.Node], Replacement]) -> Outcome:
    """Replace every node of these ops of domain qwen."""
    outcome = Outcome()
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type in ops:
            nodes, outputs = make(node)
            for old, new in zip(node.outputs, outputs, strict=True):
                if new.shape is None:
                    new.shape = old.shape
            replace_node(graph, node, nodes, outputs)
            outcome.changed += 1
    return outcome


def producing_linear(value: ir.Value | None) -> tuple[ir.Value, Weight]:
    """The input and the weight of the qwen::linear that makes `value`."""
    node = value.producer() if value is not None else None
    if node is None or not is_linear(node) or node.inputs[0] is None:
        raise CaptureError("an op of domain qwen has an input that no projection makes", where=str(value and value.name), fix=REPORT)
    weight = weight_of(node.inputs[1])
    if weight is None:
        raise CaptureError("a projection has no weight", where=str(node.name), fix=REPORT)
    return node.inputs[0], weight


def layer_prefix(node: ir.Node) -> str:
    """`layers.3` for a node whose states belong to layer 3."""
    for value in node.inputs:
        if value is not None and value.is_graph_input() and (value.name or "").startswith("layers."):
            return ".".join((value.name or "").split(".")[:2])
    raise CaptureError("an op with state has no state input", where=str(node.name), fix=REPORT)


def regroup_pending(graph: ir.Graph, layer: str, projections: Mapping[str, ir.Value]) -> list[ir.Value]:
    """Let the pending inputs of a DeltaNet layer be what its lowering computes in one piece.

    Given  inputs layers.i.pending_qkv [B,P,C], pending_b and pending_a [B,P,Hv]; outputs of the same names with .next
    Result for each key and projection [B,T,width]: input layers.i.<key> [B,P,width], output layers.i.<key>.next = the projection

    `layer` is layers.i. Returns the new inputs, in the order of `projections`, whose shapes must be known."""
    old = {f"{layer}.{key}" for key in PENDING}
    inputs = [value for value in graph.inputs if value.name in old]
    outputs = [value for value in graph.outputs if (value.name or "").removesuffix(NEXT) in old]
    if len(inputs) != len(old) or len(outputs) != len(old):
        raise CaptureError(
            "a DeltaNet layer has not all of its pending inputs and outputs", where=layer, got=len(inputs) + len(outputs), fix=REPORT
        )
    at, after = graph.inputs.index(inputs[0]), graph.outputs.index(outputs[0])
    rows = inputs[0].shape[:2] if inputs[0].shape is not None else ("B", "P")
    for value in inputs:
        graph.inputs.remove(value)
    for value in outputs:
        graph.outputs.remove(value)
        value.name = (value.name or "").removesuffix(NEXT).replace(".pending_", ".")
    made = []
    for i, (key, projection) in enumerate(projections.items()):
        if projection.shape is None:
            raise CaptureError("a projection that stays pending has no shape", where=f"{layer}.{key}", fix=REPORT)
        pending = ir.Value(name=f"{layer}.{key}", shape=ir.Shape([*rows, *projection.shape[2:]]), type=projection.type)
        projection.name = f"{layer}.{key}{NEXT}"
        graph.inputs.insert(at + i, pending)
        graph.outputs.insert(after + i, projection)
        made.append(pending)
    return made


def offset_weight(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """The weight of a qwen::rms_norm with its offset folded in, as an initializer."""
    source = node.inputs[1]
    weight, offset = weight_of(source), node.attributes.get_float("offset")
    if source is None or source.name is None or not isinstance(weight, StoredWeight):
        raise TypeError(f"the weight of {node.name} is not a stored tensor")
    return add_weight(graph, f"{source.name}.scale", Offset(weight, offset)) if offset else source


def query_and_gate(packed: Weight, context: PassContext) -> tuple[Weight, Weight]:
    """q_proj's rows [Hq, (query D | gate D), K] as two weights [Hq*D, K]."""
    D = context.config.head_dim
    return HeadRows(packed, 2 * D, 0, D), HeadRows(packed, 2 * D, D, D)
