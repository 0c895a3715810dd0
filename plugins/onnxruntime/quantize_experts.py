"""Experts that the precision plan quantizes, on the kernels of plugins/native/cpu/moe_op.cc, plugins/native/quant_moe.cu and
plugins/native/fp8_moe.cu."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qwen_export.errors import ConfigError
from qwen_export.graphs.passes.pass_context import PassContext, new_node, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.quantization.precision_plan import GroupFormat
from qwen_export.graphs.weights.expression import weight_of
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.onnxruntime.experts_plugin import MOE, WEIGHT_INPUTS
from qwen_export.plugins.onnxruntime.linear_plugin import is_native
from qwen_export.plugins.onnxruntime.quantized_forms import FORMS
from qwen_export.plugins.rewrite import ONE_FORMAT

# Of an expert's width: its gate and up rows are whole panels.
_WIDTH_UNIT = 16


def quantize_experts(model: ir.Model, context: PassContext) -> Outcome:
    """Given  qwen.native::Moe(x, logits, gate_up, down)                     weights that the plan quantizes
    Result qwen.native::QuantMoe(x, logits, packed, packed), or, in fp8, Fp8Moe(x, logits, codes, scales, codes, scales)"""
    plan, outcome = context.quantization, Outcome()
    if plan is None:
        return Outcome.nothing("nothing is quantized")
    if not context.config.is_moe:
        return Outcome.nothing("the model has no experts")
    for node in [node for node in model.graph if is_native(node, MOE)]:
        weights = [node.inputs[i] for i in WEIGHT_INPUTS]
        formats = [plan.of_weight(weight) if (weight := weight_of(value)) is not None else GroupFormat() for value in weights]
        quantized = [chosen.quantized for chosen in formats]
        where, inner = str(node.name), context.config.moe_intermediate_size
        if not any(quantized):
            if context.choices["moe"].quantized_only:
                raise ConfigError(
                    "on this device a plan must quantize the experts of every layer, those of the draft head too, or of none",
                    where=where,
                    fix='Set one format for all of [experts] in {plan_file}: quantized, or "stored".',
                )
            outcome.skip(node, "the precision plan keeps these experts as they are stored")
            continue
        if not all(quantized) or FORMS[formats[0].format] is not FORMS[formats[1].format]:
            raise ConfigError(
                "a plan must quantize both matrices of the experts or neither, and to fp8 both or neither",
                where=where,
                got=", ".join(map(str, formats)),
                fix=ONE_FORMAT,
            )
        if inner % _WIDTH_UNIT:
            raise ConfigError(
                f"experts are quantized where their width is a multiple of {_WIDTH_UNIT}",
                where=where,
                got=inner,
                fix='Set format = "stored" for [experts] in {plan_file}.',
            )
        attributes: dict[str, Any] = {"top_k": node.attributes.get_int("top_k"), "inner": inner}
        form, matrices = FORMS[formats[0].format], list[ir.Value]()
        for prefix, value in zip(("gate_up", "down"), weights, strict=True):
            weight = weight_of(value)
            if value is None or weight is None:
                raise TypeError("the experts have no stored weight")
            matrix, found = form.experts(model.graph, str(value.name), weight, plan)
            matrices += matrix
            attributes |= {f"{prefix}_{name}": given for name, given in found.items()}
        made = new_node(NATIVE, form.moe, [*node.inputs[:2], *matrices], like=node.outputs[0], **attributes)
        made.outputs[0].shape, made.name = node.outputs[0].shape, f"{node.name}.{formats[0].format}"
        replace_node(model.graph, node, [made], made.outputs)
        outcome.changed += 1
    return outcome
