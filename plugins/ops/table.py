"""Every op of domain `qwen`."""

from __future__ import annotations

from qwen_export.plugins.ops.gated_attention import gated_attention
from qwen_export.plugins.ops.gated_delta_net import gated_delta_net
from qwen_export.plugins.ops.moe import moe
from qwen_export.plugins.ops.rms_norm import rms_norm

OPS = {op.name: op for op in (rms_norm, gated_delta_net, gated_attention, moe)}
