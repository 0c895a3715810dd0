"""The gated attention mixer: projections around the op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.ops.gated_attention_op import gated_attention


class HeadNormWeight(nn.Module):
    """Holder of a zero-centered per-head norm weight; the op applies it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))


class Attention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        H, D = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
        self.q_proj = nn.Linear(H, self.heads * 2 * D, bias=False)
        self.k_proj = nn.Linear(H, self.kv_heads * D, bias=False)
        self.v_proj = nn.Linear(H, self.kv_heads * D, bias=False)
        self.o_proj = nn.Linear(self.heads * D, H, bias=False)
        self.q_norm = HeadNormWeight(D)
        self.k_norm = HeadNormWeight(D)

    def forward(self, x: Tensor, state: dict[str, Tensor], cos: Tensor, sin: Tensor, length: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """x [B,T,H], cos, sin [S,R/2], length i64[B] -> [B,T,H] and the layer's next state."""
        y, k_cache, v_cache = gated_attention(
            self.q_proj(x),
            self.k_proj(x),
            self.v_proj(x),
            self.q_norm.weight,
            self.k_norm.weight,
            cos,
            sin,
            state["k_cache"],
            state["v_cache"],
            length,
            self.heads,
            self.kv_heads,
            self.eps,
        )
        return self.o_proj(y), {"k_cache": k_cache, "v_cache": v_cache}
