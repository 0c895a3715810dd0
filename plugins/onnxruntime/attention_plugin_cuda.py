"""gated_attention on our CUDA kernel: one product, then norms, rotation, cache write, attention and gate in one launch for few tokens.

Its sequences may differ in length at any number of new tokens, and it takes `length` as the graph has it.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.bundle_contract import LENGTH, TABLES
from qwen_export.graphs.ops.gated_attention_op import gated_attention
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.weights.expression import Stacked
from qwen_export.plugins.emitter import Emitter, Shared
from qwen_export.plugins.onnxruntime.attention_cpu import head_norm_weight, rotary_input
from qwen_export.plugins.onnxruntime.gated_attention_node import gated_attention_node
from qwen_export.plugins.rewrite import Replacement, layer_prefix, producing_linear, query_and_gate


def lower_attention_plugin_cuda(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """Given  y, K', V' = gated_attention(linear(x, Wq), linear(x, Wk), linear(x, Wv), ..., length)
    Result linear (q|k|v|gate), qwen.native::GatedAttention"""
    prefix = f"{layer_prefix(node)}.self_attn"
    emit = Emitter(graph, prefix, shared)
    given = dict(zip(gated_attention.inputs, node.inputs, strict=True))
    x, packed = producing_linear(given["q_gate"])
    query, gate = query_and_gate(packed, context)
    rows = (query, producing_linear(given["k"])[1], producing_linear(given["v"])[1], gate)
    projection = emit.linear(x, Stacked(rows), f"{prefix}.in_proj")
    norms = (head_norm_weight(graph, given["q_norm"]), head_norm_weight(graph, given["k_norm"]))
    tables = [rotary_input(graph, name, context.activation) for name in TABLES]
    caches = (given["k_cache"], given["v_cache"], given[LENGTH])
    return gated_attention_node(emit, [projection, None, None, None, *norms, *tables, *caches], context)
