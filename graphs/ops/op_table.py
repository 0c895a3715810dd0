"""Every op of domain `qwen`."""

from __future__ import annotations

from qwen_export.graphs.ops.gated_attention_op import gated_attention
from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.ops.moe_op import moe
from qwen_export.graphs.ops.picture_attention_op import picture_attention
from qwen_export.graphs.ops.place_features_op import place_features
from qwen_export.graphs.ops.rms_norm_op import rms_norm

OPS = {op.name: op for op in (rms_norm, gated_delta_net, gated_attention, moe, picture_attention, place_features)}
