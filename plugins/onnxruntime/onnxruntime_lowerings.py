"""Every lowering to ONNX Runtime, by op and by the name that plugins.onnxruntime.choices gives it."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import LINEAR
from qwen_export.plugins.onnxruntime.attention_cpu import lower_group_query_attention
from qwen_export.plugins.onnxruntime.attention_cuda import lower_packed_attention
from qwen_export.plugins.onnxruntime.delta_net_builtin_cpu import lower_linear_attention
from qwen_export.plugins.onnxruntime.delta_net_builtin_cuda import lower_packed_delta_net
from qwen_export.plugins.onnxruntime.delta_net_plugin_cpu import lower_native_transaction
from qwen_export.plugins.onnxruntime.delta_net_plugin_cuda import lower_native_delta_net
from qwen_export.plugins.onnxruntime.native_linear import lower_native_linear
from qwen_export.plugins.onnxruntime.onnxruntime_experts import lower_microsoft_moe, lower_native_moe
from qwen_export.plugins.onnxruntime.simple_ops import lower_fused_matmul, lower_simplified_norm
from qwen_export.plugins.rewrite import Lowering, lower_ops

LOWERINGS: dict[tuple[str, str], Lowering] = {
    ("gated_delta_net", "linear_attention"): lower_linear_attention,
    ("gated_delta_net", "packed_delta_net"): lower_packed_delta_net,
    ("gated_delta_net", "native_delta_net"): lower_native_delta_net,
    ("gated_delta_net", "native_transaction"): lower_native_transaction,
    ("gated_attention", "group_query_attention"): lower_group_query_attention,
    ("gated_attention", "packed_group_query_attention"): lower_packed_attention,
    ("rms_norm", "simplified_norm"): lower_simplified_norm,
    ("moe", "native_moe"): lower_native_moe,
    ("moe", "native_quant_moe"): lower_native_moe,
    ("moe", "microsoft_moe"): lower_microsoft_moe,
    (LINEAR, "fused_matmul"): lower_fused_matmul,
    (LINEAR, "native_linear"): lower_native_linear,
}


def lower_mixers(model: ir.Model, context: PassContext) -> Outcome:
    """Lower the two stateful ops. They may regroup the projections that feed them, so linears are lowered after them."""
    outcome = lower_ops(model, context, ("gated_delta_net", "gated_attention"), LOWERINGS)
    for value in [v for v in model.graph.inputs if v.name == "length" and not v.uses()]:
        model.graph.inputs.remove(value)
    return outcome


def lower_simple_ops(model: ir.Model, context: PassContext) -> Outcome:
    """Lower everything else of domain qwen."""
    return lower_ops(model, context, ("rms_norm", "moe", LINEAR), LOWERINGS)
