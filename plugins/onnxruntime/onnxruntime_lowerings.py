"""Every lowering to ONNX Runtime, by op and by the name that plugins.onnxruntime.choices gives it."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.bundle_contract import LENGTH
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import LINEAR
from qwen_export.plugins.onnxruntime.attention_cpu import lower_attention_cpu
from qwen_export.plugins.onnxruntime.attention_cuda import lower_attention_cuda
from qwen_export.plugins.onnxruntime.attention_plugin_cpu import lower_attention_plugin_cpu
from qwen_export.plugins.onnxruntime.attention_plugin_cuda import lower_attention_plugin_cuda
from qwen_export.plugins.onnxruntime.delta_net_builtin_cpu import lower_delta_net_builtin_cpu
from qwen_export.plugins.onnxruntime.delta_net_builtin_cuda import lower_delta_net_builtin_cuda
from qwen_export.plugins.onnxruntime.delta_net_plugin_cpu import lower_delta_net_plugin_cpu
from qwen_export.plugins.onnxruntime.delta_net_plugin_cuda import lower_delta_net_plugin_cuda
from qwen_export.plugins.onnxruntime.experts_builtin import lower_experts_builtin
from qwen_export.plugins.onnxruntime.experts_plugin import lower_experts_plugin
from qwen_export.plugins.onnxruntime.linear_builtin import lower_linear_builtin
from qwen_export.plugins.onnxruntime.linear_plugin import lower_linear_plugin
from qwen_export.plugins.onnxruntime.norm_builtin import lower_simplified_norm
from qwen_export.plugins.onnxruntime.norm_plugin import lower_native_norm
from qwen_export.plugins.onnxruntime.picture_attention_builtin import lower_picture_attention
from qwen_export.plugins.onnxruntime.picture_attention_plugin import lower_picture_attention_plugin
from qwen_export.plugins.onnxruntime.place_features_builtin import lower_place_features
from qwen_export.plugins.rewrite import Lowering, lower_ops

LOWERINGS: dict[tuple[str, str], Lowering] = {
    ("gated_delta_net", "builtin_cpu"): lower_delta_net_builtin_cpu,
    ("gated_delta_net", "builtin_cuda"): lower_delta_net_builtin_cuda,
    ("gated_delta_net", "plugin_cuda"): lower_delta_net_plugin_cuda,
    ("gated_delta_net", "plugin_cpu"): lower_delta_net_plugin_cpu,
    ("gated_attention", "builtin_cpu"): lower_attention_cpu,
    ("gated_attention", "plugin_cpu"): lower_attention_plugin_cpu,
    ("gated_attention", "builtin_cuda"): lower_attention_cuda,
    ("gated_attention", "plugin_cuda"): lower_attention_plugin_cuda,
    ("rms_norm", "simplified_norm"): lower_simplified_norm,
    ("rms_norm", "native_norm"): lower_native_norm,
    ("moe", "native_moe"): lower_experts_plugin,
    ("moe", "native_quant_moe"): lower_experts_plugin,
    ("moe", "microsoft_moe"): lower_experts_builtin,
    (LINEAR, "fused_matmul"): lower_linear_builtin,
    (LINEAR, "native_linear"): lower_linear_plugin,
    ("picture_attention", "multi_head"): lower_picture_attention,
    ("picture_attention", "native_tower"): lower_picture_attention_plugin,
    ("place_features", "scatter"): lower_place_features,
}


def lower_mixers(model: ir.Model, context: PassContext) -> Outcome:
    """Lower the two stateful ops. They may regroup the projections that feed them, so linears are lowered after them."""
    outcome = lower_ops(model, context, ("gated_delta_net", "gated_attention"), LOWERINGS)
    for value in [v for v in model.graph.inputs if v.name == LENGTH and not v.uses()]:
        model.graph.inputs.remove(value)
    return outcome


def lower_simple_ops(model: ir.Model, context: PassContext) -> Outcome:
    """Lower everything else of domain qwen."""
    return lower_ops(model, context, ("rms_norm", "moe", LINEAR, "place_features"), LOWERINGS)


def lower_tower(model: ir.Model, context: PassContext) -> Outcome:
    """Lower the ops of the vision tower."""
    return lower_ops(model, context, ("picture_attention", LINEAR), LOWERINGS)
