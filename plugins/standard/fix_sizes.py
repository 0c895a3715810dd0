"""A graph for calls of one size: no dynamic dim is left, and what such calls never use leaves the signature."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qwen_export.bundle_contract import ACCEPTED, COMMIT, HIDDEN, HIDDEN_OUT, LENGTH, LOGIT_ROWS, LOGITS, NEXT, PLACES
from qwen_export.graphs.models.model_state import PENDING
from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.remove_dead import remove_dead

_COUNTS = (LENGTH, ACCEPTED, COMMIT, LOGIT_ROWS, PLACES)
_HIDDEN = (HIDDEN, HIDDEN_OUT)
# Operators whose results torch.onnx leaves without a type, though they have that of the first input.
_SAME_TYPE = ("Sigmoid",)


def fix_sizes(model: ir.Model, context: PassContext) -> Outcome:
    """Given  a captured graph with dims B T S N P K
    Result the same with B = 1 and the sizes of the context; counts are i32. Without pending tokens (P = 0) their inputs and `accepted`
           are gone; where calls are never padded, `commit` too. Features of pictures have a row for each of the T tokens.
           Where the logits are those of all tokens, in order, or there are none,
           `logit_rows` is gone. Hidden states are an output where they are wanted."""
    sizes, graph = context.static, model.graph
    outcome = Outcome()
    known = {"B": 1, "T": sizes.T, "B*T": sizes.T, "S": sizes.S, "N": sizes.N, "P": sizes.P, "K": sizes.T}
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None and not value.shape.is_static():
            outcome.changed += 1
            value.shape = ir.Shape([known.get(d.value or "", d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape])
        if value.name in _COUNTS:
            value.type = ir.TensorType(ir.DataType.INT32)
    if not sizes.P:
        _forget(graph, (*PENDING, ACCEPTED) if sizes.padded else (*PENDING, ACCEPTED, COMMIT))
    unwanted = {*((LOGITS,) if not sizes.N else ()), *(_HIDDEN if not sizes.hidden else ())}
    for value in [value for value in graph.outputs if value.name in unwanted]:
        graph.outputs.remove(value)
    _choose_logits(graph, every=sizes.N == sizes.T)
    remove_dead(model, context)
    for value in [value for value in graph.inputs if value.name == LOGIT_ROWS and not value.uses()]:
        graph.inputs.remove(value)
    for node in graph:
        for value in node.outputs:
            if value.dtype is None and node.op_type in _SAME_TYPE and node.inputs[0] is not None and node.inputs[0].dtype is not None:
                value.type = ir.TensorType(node.inputs[0].dtype)
    return outcome


def _forget(graph: ir.Graph, gone: Sequence[str]) -> None:
    """Inputs of the transaction that calls never use."""
    for node in graph:
        if node.domain == DOMAIN and node.op_type == gated_delta_net.name:
            for name in gone:
                node.replace_input_with(gated_delta_net.inputs.index(name), None)
    for values in (graph.inputs, graph.outputs):
        for value in list(values):
            key = (value.name or "").removesuffix(NEXT).rsplit(".", 1)[-1]
            if key in gone:
                values.remove(value)
                value.name = (value.name or "").removesuffix(NEXT).replace(".pending_", ".")


def _choose_logits(graph: ir.Graph, *, every: bool) -> None:
    """The LM head reads all rows of the hidden states without a Gather."""
    rows = next(value for value in graph.inputs if value.name == LOGIT_ROWS)
    gather = next(node for node in graph if node.op_type == "Gather" and node.inputs[1] is rows)
    if every and gather.inputs[0] is not None:
        gather.outputs[0].replace_all_uses_with(gather.inputs[0])
