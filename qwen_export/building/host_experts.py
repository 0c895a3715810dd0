"""Routed experts that a GPU may read from host memory: inputs of the graphs, which the runtime binds to wherever it has put them."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.plugins.onnxruntime.fuse_mixture import FIRST_EXPERT_INPUT, MIXTURE
from qwen_export.plugins.onnxruntime.quantized_forms import PackedForm

# Where each op's matrices of experts begin.
_FIRST = {PackedForm.moe: 2, MIXTURE: FIRST_EXPERT_INPUT}


def expert_weights(model: ir.Model) -> tuple[str, ...]:
    """Names of the weights that quantized experts read, in the order of the layers."""
    readers = [node for node in model.graph if node.op_type in _FIRST]
    names = [value.name or "" for node in readers for value in node.inputs[_FIRST[node.op_type] :] if value is not None]
    return tuple(name for name in names if name in model.graph.initializers)


def with_inputs(model: ir.Model) -> ir.Model:
    """A copy of a written model that has these weights as inputs, behind its own."""
    made = model.clone()
    for name in expert_weights(model):
        value = made.graph.initializers.pop(name)
        value.const_value = None
        made.graph.inputs.append(value)
    return made
