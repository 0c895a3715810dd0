"""qwen::rms_norm, root-mean-square normalization over the last dimension.

    y = x / sqrt(mean(x^2) + eps) * (weight + offset)          statistics and product in fp32, one cast at the end

`offset` is 1 for the zero-centered norms of the family and 0 for plain weights (Qwen3.5 reference: Qwen3_5RMSNorm).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_export.graphs.ops.op_schema import define


def normalize(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] of x's dtype. float64 stays float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * (weight.to(wide) + offset)).to(x.dtype)


def _fake(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return torch.empty_like(x)


rms_norm = define("rms_norm", ("y",), normalize, _fake)
