"""What a mixture layer adds up behind its experts as one node: the gate of the shared expert, its product, both sums."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.moe_op import moe
from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.passes.pass_context import PassContext, new_node, replace_node, sole_user
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import is_linear
from qwen_export.plugins.native.native_library import NATIVE


def fuse_shared_expert(model: ir.Model, context: PassContext) -> Outcome:
    """Given  s = Add(r, Add(moe(x, ...), Mul(Sigmoid(linear(x, g)), e)))     g [1,H]
    Result s = qwen.native::SharedExpertSum(moe(x, ...), e, x, g, r)         r is left out where nothing is added

    The node sums in fp32 and rounds once; the nodes that it replaces round the gate's product, the gate, what it scales and each sum."""
    if "shared_expert" not in context.choices:
        return Outcome.nothing("there is no kernel of SharedExpertSum for it" if context.config.is_moe else "the model has no experts")
    graph, outcome = model.graph, Outcome()
    for node in list(graph):
        if node.op_type != "Add" or node.domain or node.graph is None:  # has become part of a sum
            continue
        terms = _terms(node)
        if terms is None:
            outcome.skip(node, "it is not the sum of a mixture and a gated expert")
            continue
        last, residual = _with_residual(node)
        inputs = terms if residual is None else [*terms, residual]
        total = new_node(NATIVE, "SharedExpertSum", inputs, like=last.outputs[0])
        total.outputs[0].shape = last.outputs[0].shape
        replace_node(graph, last, [total], total.outputs)
        outcome.changed += 1
    return outcome


def _terms(add: ir.Node) -> list[ir.Value | None] | None:
    """Mixture, shared expert, x and g of a sum; None where it is another."""
    for experts, scaled in (tuple(add.inputs), tuple(reversed(add.inputs))):
        mixture, product = _producer(experts), _producer(scaled)
        if mixture is None or (mixture.domain, mixture.op_type) != (DOMAIN, moe.name) or product is None or product.op_type != "Mul":
            continue
        for gate, shared in (tuple(product.inputs), tuple(reversed(product.inputs))):
            sigmoid = _producer(gate)
            linear = _producer(sigmoid.inputs[0]) if sigmoid is not None and sigmoid.op_type == "Sigmoid" else None
            if linear is None or not is_linear(linear) or scaled is None or sole_user(scaled) is not add:
                continue
            x, weight = linear.inputs
            if x is mixture.inputs[0] and weight is not None and weight.shape is not None and weight.shape[0] == 1:
                return [experts, shared, x, weight]
    return None


def _with_residual(add: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The addition of the residual stream to a sum, and the stream; the sum itself and None where nothing of its shape is added."""
    y = add.outputs[0]
    user = sole_user(y)
    if user is None or user.op_type != "Add" or user.domain:
        return add, None
    residual = next((value for value in user.inputs if value is not y), None)
    return (user, residual) if residual is not None and residual.shape is not None and residual.shape == y.shape else (add, None)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None
