"""Ops that map one node to one node."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext, new_node
from qwen_export.plugins.emitter import Shared
from qwen_export.plugins.onnxruntime.fuse_residual_norm import offset_weight
from qwen_export.plugins.rewrite import Replacement


def lower_simplified_norm(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::rms_norm(x, w) -> SimplifiedLayerNormalization(x, w + offset), fp32 statistics."""
    norm = new_node(
        "",
        "SimplifiedLayerNormalization",
        [node.inputs[0], offset_weight(graph, node)],
        like=node.outputs[0],
        axis=-1,
        epsilon=node.attributes.get_float("eps"),
        stash_type=1,
    )
    return [norm], list(norm.outputs)


def lower_fused_matmul(graph: ir.Graph, node: ir.Node, context: PassContext, shared: Shared) -> Replacement:
    """qwen::linear(x, w) -> FusedMatMul(x, w, transB=1): the weight keeps the checkpoint's layout."""
    product = new_node(MICROSOFT, "FusedMatMul", list(node.inputs), like=node.outputs[0], transB=1)
    return [product], list(product.outputs)
