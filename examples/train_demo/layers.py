"""The layers of the Qwen3.5 text model as plain training modules; parameter names equal those of the released checkpoints.

Dims: B batch, T time, H hidden, Hq/Hk attention query and key heads, D their size, E experts, V vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from delta_rule import gated_delta_rule
from torch import Tensor, nn

Config = dict[str, Any]


def load_config(name: str) -> Config:
    return json.loads((Path(__file__).parent / "configs" / f"{name}.json").read_text())


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in fp32; the stored weight is centered on zero."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """x / rms(x) * weight * silu(z), per value head; this weight is a plain one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = x.float()
        y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return (self.weight * y * F.silu(z.float())).to(x.dtype)


class GatedDeltaNet(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.hk, self.hv = c["linear_num_key_heads"], c["linear_num_value_heads"]
        self.dk, self.dv, self.taps = c["linear_key_head_dim"], c["linear_value_head_dim"], c["linear_conv_kernel_dim"]
        hidden, key, value = c["hidden_size"], self.hk * self.dk, self.hv * self.dv
        self.in_proj_qkv = nn.Linear(hidden, 2 * key + value, bias=False)
        self.in_proj_z = nn.Linear(hidden, value, bias=False)
        self.in_proj_b = nn.Linear(hidden, self.hv, bias=False)
        self.in_proj_a = nn.Linear(hidden, self.hv, bias=False)
        self.conv1d = nn.Conv1d(2 * key + value, 2 * key + value, self.taps, groups=2 * key + value, bias=False)
        # Step sizes between 0.001 and 0.1, as in Mamba-2: the heads start with memories of different length.
        step = torch.exp(torch.rand(self.hv) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_log = nn.Parameter(torch.log(torch.empty(self.hv).uniform_(1, 16)))
        self.norm = GatedRMSNorm(self.dv, c["rms_norm_eps"])
        self.out_proj = nn.Linear(value, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        padded = F.pad(self.in_proj_qkv(x), (0, 0, self.taps - 1, 0))
        taps = self.conv1d.weight[:, 0].to(padded.dtype)
        mixed = F.silu(sum(padded[:, i : i + t] * taps[:, i] for i in range(self.taps)))
        q, k, v = mixed.split([self.hk * self.dk, self.hk * self.dk, self.hv * self.dv], -1)
        q = q.reshape(b, t, self.hk, self.dk).repeat_interleave(self.hv // self.hk, 2)
        k = k.reshape(b, t, self.hk, self.dk).repeat_interleave(self.hv // self.hk, 2)
        beta = self.in_proj_b(x).sigmoid()
        g = -self.A_log.float().exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias.float())
        out = gated_delta_rule(q, k, v.reshape(b, t, self.hv, self.dv), g, beta)
        z = self.in_proj_z(x).view(b, t, self.hv, self.dv)
        return self.out_proj(self.norm(out, z).flatten(2))


def rope(positions: Tensor, c: Config) -> tuple[Tensor, Tensor]:
    """cos and sin [T, rotary_dim] in fp32 for integer positions [T]."""
    parameters = c["rope_parameters"]
    dim = int(c["head_dim"] * parameters["partial_rotary_factor"])
    inverse = parameters["rope_theta"] ** (-torch.arange(0, dim, 2, device=positions.device).float() / dim)
    angles = torch.outer(positions.float(), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half on the first cos.shape[-1] dims of x [B,H,T,D]; the rest passes through."""
    dim = cos.shape[-1]
    first, rest = x[..., :dim].float(), x[..., dim:]
    half = torch.cat((-first[..., dim // 2 :], first[..., : dim // 2]), -1)
    return torch.cat(((first * cos + half * sin).to(x.dtype), rest), -1)


class GatedAttention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.hq, self.hk, self.d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        hidden = c["hidden_size"]
        self.q_proj = nn.Linear(hidden, self.hq * 2 * self.d, bias=False)
        self.k_proj = nn.Linear(hidden, self.hk * self.d, bias=False)
        self.v_proj = nn.Linear(hidden, self.hk * self.d, bias=False)
        self.o_proj = nn.Linear(self.hq * self.d, hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.d, c["rms_norm_eps"]), RMSNorm(self.d, c["rms_norm_eps"])

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q [B,Hq,T,D], k and v [B,Hq,T,D] (repeated to the query heads), gate [B,T,Hq*D]."""
        b, t, _ = x.shape
        q, gate = self.q_proj(x).view(b, t, self.hq, 2 * self.d).chunk(2, -1)
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(b, t, self.hk, self.d)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, t, self.hk, self.d).transpose(1, 2)
        group = self.hq // self.hk
        return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), gate.reshape(b, t, -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention over k and v (causal unless a bool mask is given), then the output gate and o_proj."""
        v = v.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k.to(q.dtype), v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.transpose(1, 2).flatten(2) * gate.sigmoid())

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.attend(*self.project(x, cos, sin))


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Fused expert weights; every expert is evaluated and weighted, which is faster than dispatch when experts are this small."""

    def __init__(self, count: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, hidden).normal_(0, 0.02))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner).normal_(0, 0.02))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [B,T,H], weights [B,T,E] (zero for experts not chosen) -> [B,T,H]."""
        count, inner2, _ = self.gate_up_proj.shape
        gate, up = F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (count, inner2)).chunk(2, -1)
        inner = F.silu(gate) * up * weights.to(gate.dtype).unsqueeze(-1)
        return F.linear(inner.flatten(-2), self.down_proj.transpose(0, 1).flatten(1))


class MoE(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        hidden, self.top_k = c["hidden_size"], c["num_experts_per_tok"]
        self.gate = nn.Linear(hidden, c["num_experts"], bias=False)
        self.experts = Experts(c["num_experts"], hidden, c["moe_intermediate_size"])
        self.shared_expert = MLP(hidden, c["shared_expert_intermediate_size"])
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output and the load-balancing loss E * sum_e(share of tokens on e * mean probability of e), top_k when balanced."""
        probabilities = self.gate(x).float().softmax(-1)
        top, index = probabilities.topk(self.top_k, -1)
        weights = torch.zeros_like(probabilities).scatter(-1, index, top / top.sum(-1, keepdim=True))
        load = (weights > 0).float().mean((0, 1))
        balance = (load * probabilities.mean((0, 1))).sum() * probabilities.shape[-1]
        shared = self.shared_expert(x) * self.shared_expert_gate(x).sigmoid()
        return self.experts(x, weights) + shared, balance


class DecoderLayer(nn.Module):
    def __init__(self, c: Config, kind: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.full = kind == "full_attention"
        if self.full:
            self.self_attn = GatedAttention(c)
        else:
            self.linear_attn = GatedDeltaNet(c)
        self.mlp = MoE(c) if "num_experts" in c else MLP(c["hidden_size"], c["intermediate_size"])

    def feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.mlp(self.post_attention_layernorm(x))
        y, balance = out if isinstance(out, tuple) else (out, x.new_zeros(()))
        return x + y, balance

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.input_layernorm(x)
        return self.feed_forward(x + (self.self_attn(normed, cos, sin) if self.full else self.linear_attn(normed)))


class TextModel(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(DecoderLayer(c, kind) for kind in c["layer_types"])
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
