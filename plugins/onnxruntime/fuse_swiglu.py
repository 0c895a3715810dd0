"""The gated half of an MLP as one node with one weight."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext, new_node, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import is_linear
from qwen_export.graphs.weights.expression import Stacked, add_weight, weight_of
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.onnxruntime.linear_plugin import SWIGLU


def fuse_swiglu(model: ir.Model, context: PassContext) -> Outcome:
    """Given  y = Mul(QuickGelu(linear(x, Wg), alpha=1), linear(x, Wu))
    Result y = qwen.native::SwiGlu(x, [Wg; Wu])             where linear is lowered to native_linear"""
    if context.choices["linear"].name != "native_linear":
        return Outcome.nothing(f"products are lowered to {context.choices['linear'].name}, which has no gated form")
    graph, outcome = model.graph, Outcome()
    for node in list(graph):
        if node.op_type != "Mul" or node.domain:
            continue
        silu, up = (value.producer() if value is not None else None for value in node.inputs)
        if silu is None or silu.op_type != "QuickGelu" or silu.inputs[0] is None:
            continue
        gate = silu.inputs[0].producer()
        if gate is None or up is None or not is_linear(gate) or not is_linear(up) or gate.inputs[0] is not up.inputs[0]:
            outcome.skip(node, "its operands are not two products of one input")
            continue
        gate_weight, up_weight, name = weight_of(gate.inputs[1]), weight_of(up.inputs[1]), gate.inputs[1]
        if gate_weight is None or up_weight is None or name is None or gate_weight.shape != up_weight.shape:
            outcome.skip(node, "gate and up have weights of different shapes")
            continue
        stacked = add_weight(graph, (name.name or "").replace("gate_proj", "gate_up_proj"), Stacked((gate_weight, up_weight)))
        fused = new_node(NATIVE, SWIGLU, [gate.inputs[0], stacked], like=node.outputs[0], epsilon=0.0)
        fused.outputs[0].shape = node.outputs[0].shape
        replace_node(graph, node, [fused], fused.outputs)
        outcome.changed += 1
    return outcome
