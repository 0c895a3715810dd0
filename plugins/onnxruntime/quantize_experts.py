"""Experts that the precision plan quantizes, on the kernels of plugins/native/cpu/moe_op.cc and plugins/native/quant_moe.cu."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qwen_export.errors import ConfigError
from qwen_export.graphs.passes.pass_context import PassContext, new_node, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.quantization.precision_plan import GroupFormat
from qwen_export.graphs.quantization.quantized_weights import packed_weight
from qwen_export.graphs.weights.expression import add_weight, weight_of
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.onnxruntime.experts_plugin import MOE, WEIGHT_INPUTS
from qwen_export.plugins.onnxruntime.linear_plugin import is_native
from qwen_export.plugins.rewrite import ONE_FORMAT

QUANT_MOE = "QuantMoe"
# Of an expert's width: its gate and up rows are whole panels.
_WIDTH_UNIT = 16
_FORMAT = ("bits", "block", "zeros", "wide_scales")


def quantize_experts(model: ir.Model, context: PassContext) -> Outcome:
    """Given  qwen.native::Moe(x, logits, gate_up, down)                     weights that the plan quantizes
    Result qwen.native::QuantMoe(x, logits, packed, packed)"""
    plan, outcome = context.quantization, Outcome()
    if plan is None:
        return Outcome.nothing("nothing is quantized")
    if not context.config.is_moe:
        return Outcome.nothing("the model has no experts")
    for node in [node for node in model.graph if is_native(node, MOE)]:
        weights = [node.inputs[i] for i in WEIGHT_INPUTS]
        formats = [plan.of_weight(weight) if (weight := weight_of(value)) is not None else GroupFormat() for value in weights]
        quantized = [chosen.quant is not None for chosen in formats]
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
        if not all(quantized):
            raise ConfigError(
                "a plan must quantize both matrices of the experts or neither",
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
        packed = []
        for prefix, value, chosen in zip(("gate_up", "down"), weights, formats, strict=True):
            packed.append(_packed(model.graph, value, chosen))
            found = chosen.quant.attributes(0, 0) if chosen.quant is not None else {}
            attributes |= {f"{prefix}_{name}": found[name] for name in _FORMAT}
        made = new_node(NATIVE, QUANT_MOE, [*node.inputs[:2], *packed], like=node.outputs[0], **attributes)
        made.outputs[0].shape, made.name = node.outputs[0].shape, f"{node.name}.{formats[0].format}"
        replace_node(model.graph, node, [made], made.outputs)
        outcome.changed += 1
    return outcome


def _packed(graph: ir.Graph, value: ir.Value | None, chosen: GroupFormat) -> ir.Value:
    weight = weight_of(value)
    if value is None or weight is None or chosen.quant is None:
        raise TypeError("the experts have no stored weight")
    return add_weight(graph, f"{value.name}.{chosen.format}", packed_weight(weight, chosen))
