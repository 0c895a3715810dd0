"""qwen::gated_delta_net, everything of a Gated DeltaNet mixer between its input and output projections.

Per value head h (reading key head h // (Hv/Hk)), with q, k, v from SiLU(causal depthwise conv(qkv)):

    q <- q / sqrt(|q|^2 + 1e-6) / sqrt(Dk)      k <- k / sqrt(|k|^2 + 1e-6)
    g  = -exp(a_log) softplus(a + dt_bias)      beta = sigmoid(b)
    S <- e^g S ;  S <- S + k (beta (v - S^T k))^T ;  o = S^T q
    y  = o / sqrt(mean(o^2) + eps) * norm * SiLU(z)

(Gated Delta Networks, arXiv 2412.06464, eq. 10; the norm and gates as in the Qwen3.5 reference.) Gates, recurrence, norms and state are
fp32 or wider; only y and the conv history have the activation dtype.

The op is a *transaction*. `pending_*` are the raw inputs of the previous call whose fate was open then: the first `accepted` of them are
replayed into the state before the new tokens are read, the rest are forgotten. `commit` says how many of the new tokens enter the state
that is returned. Plain decoding has P = 0, accepted = 0, commit = T. A speculative verify has commit = 0 and hands its inputs to the
next call as pending. One state read and one write per call, whatever the draft length, and an exact rollback.

    h0     = conv_history | pending_qkv         rows accepted .. accepted+K-2
    S0     = state after replaying pending[:accepted]
    y      = outputs of the T new tokens from (h0, S0)
    state' = S0 after the first `commit` new tokens;   conv_history' = (h0 | qkv) rows commit .. commit+K-2
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_export.graphs.ops.op_schema import define

L2_EPS = 1e-6


def _body(
    qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm: Tensor,
    conv_history: Tensor,
    state: Tensor,
    pending_qkv: Tensor,
    pending_b: Tensor,
    pending_a: Tensor,
    accepted: Tensor,
    commit: Tensor,
    key_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the module for the equations.

    qkv [B,T,C]  z [B,T,Hv*Dv]  b, a [B,T,Hv]  conv_weight [C,K]  a_log, dt_bias [Hv]  norm [Dv]  conv_history [B,K-1,C]
    state f32[B,Hv,Dk,Dv]  pending_qkv [B,P,C]  pending_b, pending_a [B,P,Hv]  accepted i64[B] in 0..P  commit i64[B] in 0..T
    -> y [B,T,Hv*Dv], conv_history' [B,K-1,C], state' f32[B,Hv,Dk,Dv]. Outputs at t >= commit > 0 are unspecified.
    """
    B, T, _ = qkv.shape
    P, K, Hv = pending_qkv.shape[1], conv_weight.shape[1], a.shape[2]
    if bool((accepted < 0).any() | (accepted > P).any() | (commit < 0).any() | (commit > T).any()):
        raise ValueError(f"accepted must be in 0..{P} and commit in 0..{T}, got {accepted.tolist()} and {commit.tolist()}")
    wide = torch.promote_types(state.dtype, torch.float32)
    Dk = state.shape[2]

    y = torch.empty_like(z)
    history_out, state_out = torch.empty_like(conv_history), torch.empty_like(state)
    for i in range(B):
        kept, done = int(accepted[i]), int(commit[i])
        rows = torch.cat([conv_history[i], pending_qkv[i, :kept], qkv[i]])
        u = _conv_silu(rows, conv_weight)
        gate_a, gate_b = torch.cat([pending_a[i, :kept], a[i]]), torch.cat([pending_b[i, :kept], b[i]])
        q, k, v = _split_heads(u.to(wide), key_heads, Hv, Dk)
        g = -a_log.to(wide).exp() * F.softplus(gate_a.to(wide) + dt_bias.to(wide))
        beta = gate_b.sigmoid().to(wide)
        o, state_out[i] = delta_rule(q, k, v, g, beta, state[i].to(wide), kept + done)
        y[i] = _gated_norm(o[kept:].to(z.dtype), z[i], norm, eps)
        start = kept + done
        history_out[i] = rows[start : start + K - 1]
    return y, history_out, state_out


def _conv_silu(rows: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise conv over rows [K-1+n, C], then SiLU -> [n, C]; tap K-1 multiplies the current row."""
    out = F.conv1d(rows.T[None], weight[:, None, :], groups=weight.shape[0])
    return F.silu(out)[0].T


def _split_heads(u: Tensor, Hk: int, Hv: int, Dk: int) -> tuple[Tensor, Tensor, Tensor]:
    """u [n, C] -> q, k [n,Hv,Dk] normalized and repeated for the value heads, v [n,Hv,Dv]."""
    q, k, v = u.split([Hk * Dk, Hk * Dk, u.shape[1] - 2 * Hk * Dk], dim=1)

    def unit(x: Tensor) -> Tensor:
        x = x.reshape(-1, Hk, Dk)
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)

    q, k = unit(q) * Dk**-0.5, unit(k)
    return q.repeat_interleave(Hv // Hk, 1), k.repeat_interleave(Hv // Hk, 1), v.reshape(v.shape[0], Hv, -1)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: q, k [n,Hv,Dk]  v [n,Hv,Dv]  g, beta [n,Hv]  state [Hv,Dk,Dv].

    Returns o [n,Hv,Dv] and the state after the first `keep` tokens.
    """
    S, out = state, torch.empty_like(v)
    kept = S
    for t in range(v.shape[0]):
        S = S * g[t].exp()[:, None, None]
        delta = beta[t][:, None] * (v[t] - (S * k[t][:, :, None]).sum(1))
        S = S + k[t][:, :, None] * delta[:, None, :]
        out[t] = (S * q[t][:, :, None]).sum(1)
        if t + 1 == keep:
            kept = S
    return out, kept


def _gated_norm(o: Tensor, z: Tensor, norm: Tensor, eps: float) -> Tensor:
    """o [T,Hv,Dv], z [T,Hv*Dv] -> [T,Hv*Dv]: plain-weight RMS norm per head, rounded to the activation dtype, times SiLU(z) in fp32."""
    wide = torch.promote_types(o.dtype, torch.float32)
    h = o.to(wide)
    h = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(o.dtype) * norm.to(o.dtype)
    return (h.reshape(z.shape).to(wide) * F.silu(z.to(wide))).to(z.dtype)


def _fake(
    qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm: Tensor,
    conv_history: Tensor,
    state: Tensor,
    pending_qkv: Tensor,
    pending_b: Tensor,
    pending_a: Tensor,
    accepted: Tensor,
    commit: Tensor,
    key_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(conv_history), torch.empty_like(state)


gated_delta_net = define("gated_delta_net", ("y", "conv_history_out", "state_out"), _body, _fake)
