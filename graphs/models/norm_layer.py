"""The zero-centered RMS norm of the family: the stored weight is an offset from 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_export.graphs.ops.rms_norm_op import rms_norm


class ZeroCenteredRmsNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.eps, 1.0)
