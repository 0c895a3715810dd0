"""A quantized mixture layer as one node: of few tokens its products take three launches, in which weights arrive ahead."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext, new_node, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.onnxruntime.linear_plugin import LINEAR, is_native
from qwen_export.plugins.onnxruntime.quantized_forms import PackedForm

MIXTURE = "QuantMixture"
FIRST_EXPERT_INPUT = 6
"""The routed experts are its last inputs."""


def fuse_mixture(model: ir.Model, context: PassContext) -> Outcome:
    """Given  h = RmsNorm(s, n);  l = Linear(h, r);  e = QuantLinear(QuantSwiGlu(h, a), b)          all of qwen.native
           y = SharedExpertSum(QuantMoe(h, l, u, d), e, h, g, s)                    nothing else reads what is between
    Result y = qwen.native::QuantMixture(s, n, r, g, a, b, u, d)          with the attributes of them all"""
    if "mixture" not in context.choices:
        return Outcome.nothing("there is no kernel of QuantMixture for it" if context.config.is_moe else "the model has no experts")
    graph, outcome = model.graph, Outcome()
    for node in [node for node in graph if is_native(node, "SharedExpertSum")]:
        parts = _parts(node)
        if parts is None:
            outcome.skip(node, "not all of its layer is quantized to integers")
            continue
        norm, router, gate_up, down, experts = parts
        attributes: dict[str, Any] = {}
        for prefix, part in (("norm", norm), ("router", router), ("shared_gate_up", gate_up), ("shared_down", down), ("experts", experts)):
            attributes |= {f"{prefix}_{name}": attribute.value for name, attribute in part.attributes.items()}
        inputs = [*norm.inputs, router.inputs[1], node.inputs[3], gate_up.inputs[1], down.inputs[1], *experts.inputs[2:]]
        made = new_node(NATIVE, MIXTURE, inputs, like=node.outputs[0], **attributes)
        made.outputs[0].shape, made.name = node.outputs[0].shape, experts.name
        replace_node(graph, node, [made], made.outputs)
        for part in (experts, down, gate_up, router, norm):
            graph.remove(part, safe=True)
        outcome.changed += 1
    return outcome


def _parts(total: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node, ir.Node, ir.Node] | None:
    """Norm, router, the two products of the shared expert, and the experts; None where the layer is another."""
    if len(total.inputs) < 5:
        return None
    experts, down, norm = (_made_by(total.inputs[i], op) for i, op in enumerate((PackedForm.moe, PackedForm.linear, "RmsNorm")))
    if experts is None or down is None or norm is None:
        return None
    router, gate_up = _made_by(experts.inputs[1], LINEAR), _made_by(down.inputs[0], PackedForm.swiglu)
    if router is None or gate_up is None or norm.inputs[0] is not total.inputs[4]:
        return None
    h = norm.outputs[0]
    if any(node.inputs[0] is not h for node in (router, gate_up, experts)):
        return None
    if any(value is not None for node in (router, gate_up, down) for value in node.inputs[2:]):  # a residual, a norm or a tail
        return None
    inside = (norm, router, gate_up, down, experts)
    if any(part.outputs[0].is_graph_output() or set(part.outputs[0].consumers()) - {*inside, total} for part in inside):
        return None
    return inside


def _made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and is_native(node, op) else None
