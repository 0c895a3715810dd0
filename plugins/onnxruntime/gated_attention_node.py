"""The node qwen.native::GatedAttention, which the plugins of the CPU and of CUDA have under one signature."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.plugins.emitter import Emitter
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.rewrite import Replacement


def gated_attention_node(emit: Emitter, inputs: Sequence[ir.Value | None], context: PassContext) -> Replacement:
    """`inputs` in the order of the op: q, k, v, gate (or all packed in q), q_norm, k_norm, cos, sin, k_cache, v_cache, length."""
    config = context.config
    y, *caches = emit(
        NATIVE,
        "GatedAttention",
        inputs,
        3,
        dtype=context.activation,
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        scale=config.head_dim**-0.5,
        epsilon=config.rms_norm_eps,
    )
    for value, before in zip(caches, inputs[-3:-1], strict=True):
        value.type = before.type if before is not None else None
    return emit.nodes, [y, *caches]
