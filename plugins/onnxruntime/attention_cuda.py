"""gated_attention on GroupQueryAttention (ONNX Runtime CUDA), with packed q|k|v and the head norms inside the kernel."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.gated_attention_op import gated_attention
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.weights.expression import Stacked
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.onnxruntime.attention_cpu import attend, gated, head_norm_weight
from qwen_export.plugins.rewrite import Replacement, layer_prefix, producing_linear, query_and_gate


def lower_attention_cuda(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """Given  y, K', V' = gated_attention(linear(x, Wq), linear(x, Wk), linear(x, Wv), ..., length)
    Result linear x2 (q|k|v, gate), GroupQueryAttention, Sigmoid, Mul"""
    prefix = f"{layer_prefix(node)}.self_attn"
    emit = Emitter(graph, prefix, shared)
    given = dict(zip(gated_attention.inputs, node.inputs, strict=True))
    x, packed = producing_linear(given["q_gate"])
    query_rows, gate_rows = query_and_gate(packed, context)
    rows = (query_rows, producing_linear(given["k"])[1], producing_linear(given["v"])[1])
    qkv = emit.linear(x, Stacked(rows), f"{prefix}.qkv_proj")
    gate = emit.linear(x, gate_rows, f"{prefix}.q_proj.gate")
    norms = (head_norm_weight(graph, given["q_norm"]), head_norm_weight(graph, given["k_norm"]))
    o, k_cache, v_cache = attend(emit, [qkv, None, None], given, context, norms)
    return emit.nodes, [gated(emit, o, gate), k_cache, v_cache]
