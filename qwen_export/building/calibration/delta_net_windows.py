"""A DeltaNet mixer over whole windows of a text at once, each from an empty state.

The op's eager body reads token by token. This is the same recurrence in chunks of C tokens (Gated Delta Networks, arXiv 2412.06464,
section 3.3): with G the running sum of the decays in a chunk and D_ij = exp(G_i - G_j),

    A = strictly lower part of (beta k k^T) D        U = (1 + A)^-1 (beta v)        W = (1 + A)^-1 (beta k exp(G))
    v' = U - W S        o = (q exp(G)) S + (lower part of (q k^T) D) v'        S <- exp(G_C) S + (k exp(G_C - G))^T v'
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_export.graphs.models.delta_net_layer import DeltaNet
from qwen_export.graphs.ops.gated_delta_net_op import L2_EPS

_CHUNK = 64


def read_windows(mixer: DeltaNet, x: Tensor) -> Tensor:
    """x f32[B,T,H] after the norm -> f32[B,T,Hv*Dv], what the output projection reads."""
    z, Hv, Dv = mixer.in_proj_z(x), len(mixer.A_log), len(mixer.norm.weight)
    weight = mixer.conv1d.weight
    rows = F.pad(mixer.in_proj_qkv(x).transpose(1, 2), (weight.shape[-1] - 1, 0))
    u = F.silu(F.conv1d(rows, weight, groups=len(weight))).transpose(1, 2)
    B, T, C = u.shape
    keys = (C - Hv * Dv) // 2
    q, k, v = u.split([keys, keys, C - 2 * keys], dim=-1)

    def unit(values: Tensor) -> Tensor:
        heads = values.reshape(B, T, mixer.key_heads, -1)
        heads = heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + L2_EPS)
        return heads.repeat_interleave(Hv // mixer.key_heads, 2).transpose(1, 2)

    q, k, v = unit(q), unit(k), v.reshape(B, T, Hv, Dv).transpose(1, 2)
    g = (-mixer.A_log.exp() * F.softplus(mixer.in_proj_a(x) + mixer.dt_bias)).transpose(1, 2)
    o = delta_rule(q * q.shape[-1] ** -0.5, k, v, g, mixer.in_proj_b(x).sigmoid().transpose(1, 2)).transpose(1, 2)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + mixer.eps) * mixer.norm.weight
    return o.reshape(B, T, -1) * F.silu(z)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """q, k [...,T,Dk]  v [...,T,Dv]  g, beta [...,T] -> o [...,T,Dv], from an empty state."""
    T = v.shape[-2]
    fill = -T % _CHUNK
    q, k, v = (_chunks(F.pad(x, (0, 0, 0, fill))) for x in (q, k, v))
    g, beta = (F.pad(x, (0, fill)).unflatten(-1, (-1, _CHUNK)) for x in (g, beta))
    G = g.cumsum(-1)
    # Above the diagonal the difference is positive, and could overflow.
    decay = (G[..., :, None] - G[..., None, :]).tril().exp().tril()
    scaled = k * beta[..., None]
    lower = (scaled @ k.mT * decay).tril(-1)
    sides = torch.cat([v * beta[..., None], scaled * G.exp()[..., None]], dim=-1)
    U, W = torch.linalg.solve_triangular(lower, sides, upper=False, unitriangular=True).split([v.shape[-1], k.shape[-1]], dim=-1)
    inside = q @ k.mT * decay
    read, last = q * G.exp()[..., None], G[..., -1]
    kept = k * (last[..., None] - G).exp()[..., None]
    S = torch.zeros(*v.shape[:-3], k.shape[-1], v.shape[-1])
    out = torch.empty_like(v)
    for c in range(v.shape[-3]):
        fresh = U[..., c, :, :] - W[..., c, :, :] @ S
        out[..., c, :, :] = read[..., c, :, :] @ S + inside[..., c, :, :] @ fresh
        S = S * last[..., c].exp()[..., None, None] + kept[..., c, :, :].mT @ fresh
    return out.flatten(-3, -2)[..., :T, :]


def _chunks(x: Tensor) -> Tensor:
    """[...,T,D] -> [...,T/C,C,D]."""
    return x.unflatten(-2, (-1, _CHUNK))
