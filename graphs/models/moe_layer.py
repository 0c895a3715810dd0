"""The mixture-of-experts feed-forward block: routed experts, and a shared one behind a gate of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.models.mlp_layer import Mlp
from qwen_export.graphs.ops.moe_op import moe


class Experts(nn.Module):
    """Holder of the matrices of all experts, gate rows before up rows; the op applies them. The checkpoint's names have no `.weight`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        E, H, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * inner, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, inner))


class MoeMlp(nn.Module):
    """moe(x, router(x)) + sigmoid(shared_expert_gate(x)) * shared_expert(x)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.shared_expert = Mlp(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,T,H] -> [B,T,H]."""
        routed = moe(x, self.gate(x), self.experts.gate_up_proj, self.experts.down_proj, self.top_k)
        return routed + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
