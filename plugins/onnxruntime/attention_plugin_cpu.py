"""gated_attention on our CPU kernel: head norms, rotation, attention and the output gate are one op, for any number of sequences and
tokens, each behind its own past. It takes `length` as the graph has it."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.ops.gated_attention_op import gated_attention
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.onnxruntime.attention_cpu import head_norm_weight
from qwen_export.plugins.onnxruntime.gated_attention_node import gated_attention_node
from qwen_export.plugins.rewrite import Replacement, layer_prefix, producing_linear, query_and_gate


def lower_attention_plugin_cpu(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """Given  y, K', V' = gated_attention(linear(x, Wq), linear(x, Wk), linear(x, Wv), ..., length)
    Result linear x2 (query, gate), qwen.native::GatedAttention"""
    prefix = f"{layer_prefix(node)}.self_attn"
    emit = Emitter(graph, prefix, shared)
    given = dict(zip(gated_attention.inputs, node.inputs, strict=True))
    x, packed = producing_linear(given["q_gate"])
    query_rows, gate_rows = query_and_gate(packed, context)
    q = emit.linear(x, query_rows, f"{prefix}.q_proj.query")
    gate = emit.linear(x, gate_rows, f"{prefix}.q_proj.gate")
    norms = [head_norm_weight(graph, given[name]) for name in ("q_norm", "k_norm")]
    others = (given[name] for name in ("cos", "sin", "k_cache", "v_cache", "length"))
    return gated_attention_node(emit, [q, given["k"], given["v"], gate, *norms, *others], context)
