"""The Gated DeltaNet mixer: four input projections, the op, one output projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net


class PlainNormWeight(nn.Module):
    """Holder of the gated norm's weight, which is not zero-centered; the op applies it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class DeltaNet(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        H, Hv = config.hidden_size, config.linear_num_value_heads
        self.key_heads, self.eps = config.linear_num_key_heads, config.rms_norm_eps
        self.in_proj_qkv = nn.Linear(H, config.conv_dim, bias=False)
        self.in_proj_z = nn.Linear(H, config.value_dim, bias=False)
        self.in_proj_b = nn.Linear(H, Hv, bias=False)
        self.in_proj_a = nn.Linear(H, Hv, bias=False)
        self.conv1d = nn.Conv1d(config.conv_dim, config.conv_dim, config.linear_conv_kernel_dim, groups=config.conv_dim, bias=False)
        self.A_log = nn.Parameter(torch.zeros(Hv))
        self.dt_bias = nn.Parameter(torch.ones(Hv))
        self.norm = PlainNormWeight(config.linear_value_head_dim)
        self.out_proj = nn.Linear(config.value_dim, H, bias=False)

    def forward(self, x: Tensor, state: dict[str, Tensor], accepted: Tensor, commit: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """x [B,T,H] -> [B,T,H] and the layer's next state; `state` as in graphs.models.state."""
        qkv, b, a = self.in_proj_qkv(x), self.in_proj_b(x), self.in_proj_a(x)
        y, history, recurrent = gated_delta_net(
            qkv,
            self.in_proj_z(x),
            b,
            a,
            self.conv1d.weight.squeeze(1),
            self.A_log,
            self.dt_bias,
            self.norm.weight,
            state["conv_history"],
            state["recurrent"],
            state["pending_qkv"],
            state["pending_b"],
            state["pending_a"],
            accepted,
            commit,
            self.key_heads,
            self.eps,
        )
        after = {"conv_history": history, "recurrent": recurrent, "pending_qkv": qkv, "pending_b": b, "pending_a": a}
        return self.out_proj(y), after
