"""Routed experts that a GPU may read from host memory: inputs of the graphs, which the runtime binds to wherever it has put them."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.quantization.precision_plan import PrecisionPlan
from qwen_export.plugins.onnxruntime.experts_plugin import MOE
from qwen_export.targets import Target


def host_expert_reasons(target: Target, config: TextConfig, plan: PrecisionPlan | None, stages: int | None) -> list[str]:
    """Why a build cannot have them, none where it can."""
    reasons = []
    if target.static:
        reasons.append(f"target {target.name} has no experts in host memory")
    if not config.is_moe:
        reasons.append("the model has no experts that could stay in host memory")
    elif plan is None or plan.groups["experts"].quant is None:
        reasons.append("experts in host memory must be quantized: build in int4 or int8")
    if stages is not None and stages > 1:
        reasons.append(f"experts in host memory are for one GPU, not for {stages} stages")
    return reasons


def expert_weights(model: ir.Model) -> tuple[str, ...]:
    """Names of the weights that quantized experts read, in the order of the layers."""
    names = [value.name or "" for node in model.graph if node.op_type == f"Quant{MOE}" for value in node.inputs if value is not None]
    return tuple(name for name in names if name in model.graph.initializers)


def with_inputs(model: ir.Model) -> ir.Model:
    """A copy of a written model that has these weights as inputs, behind its own."""
    made = model.clone()
    for name in expert_weights(model):
        value = made.graph.initializers.pop(name)
        value.const_value = None
        made.graph.inputs.append(value)
    return made
