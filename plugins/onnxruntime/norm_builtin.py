"""qwen::rms_norm on ONNX Runtime's SimplifiedLayerNormalization, where no product and no addition has absorbed it."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext, new_node
from qwen_export.plugins.emitter import Shared
from qwen_export.plugins.rewrite import Replacement, offset_weight


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
