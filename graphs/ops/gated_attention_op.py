"""qwen::gated_attention, causal grouped-query attention over a cache of fixed capacity, with the family's output gate.

    q | gate = q_gate, per head                   (the first D values of a head are the query, the next D its gate)
    q, k     = RoPE(rms_norm(q)), RoPE(rms_norm(k))     zero-centered norms, rotate-half on the first R dimensions
    o        = softmax(q K^T / sqrt(D)) V         over slots 0 .. length+t of the cache, fp32 softmax
    y        = o * sigmoid(gate)

(Qwen3.5 reference: Qwen3_5Attention.) New keys and values are written to slots length .. length+T-1. Rows `slot` of the cos and sin
tables belong to the token in that cache slot: for text, slot and position are the same; images write their 3-axis angles there. All
queries, those of the new tokens too, see keys and values as the cache keeps them (cache_formats.py).
Rolling back is passing a smaller length: slots at and beyond it are never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_export.graphs.ops.cache_rows import row_values, stored_rows
from qwen_export.graphs.ops.op_schema import define
from qwen_export.graphs.ops.rms_norm_op import normalize


def _body(
    q_gate: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q_gate [B,T,Hq*2D]  k, v [B,T,Hkv*D]  q_norm, k_norm [D] (zero-centered)  cos, sin f32[S,R/2]  caches [B,Hkv,S,W]  length i64[B]
    -> y [B,T,Hq*D], k_cache', v_cache'.
    """
    B, T, _ = k.shape
    D, S = q_norm.shape[0], k_cache.shape[2]
    if int(length.max()) + T > S:
        raise ValueError(f"{int(length.max())} cached and {T} new tokens do not fit a cache of {S}")
    wide = torch.promote_types(k.dtype, torch.float32)
    q, gate = q_gate.reshape(B, T, heads, 2 * D).split(D, dim=3)
    q, k = normalize(q, q_norm, eps, 1.0), normalize(k.reshape(B, T, kv_heads, D), k_norm, eps, 1.0)
    v = v.reshape(B, T, kv_heads, D)
    k_out, v_out = k_cache.clone(), v_cache.clone()
    y = torch.empty_like(q)
    for i in range(B):
        start = int(length[i])
        end = start + T
        rows = slice(start, end)
        k_out[i, :, rows] = stored_rows(_rotate(k[i], cos[rows], sin[rows]).transpose(0, 1), k_out.dtype)
        v_out[i, :, rows] = stored_rows(v[i].transpose(0, 1), v_out.dtype)
        query = _rotate(q[i], cos[rows], sin[rows]).transpose(0, 1)
        keys = row_values(k_out[i, :, :end], D, query.dtype).repeat_interleave(heads // kv_heads, 0)
        values = row_values(v_out[i, :, :end], D, query.dtype).repeat_interleave(heads // kv_heads, 0)
        score = (query @ keys.transpose(1, 2)) * D**-0.5
        future = torch.ones(T, end, dtype=torch.bool).triu(start + 1)
        weight = score.to(wide).masked_fill(future, float("-inf")).softmax(-1).to(values.dtype)
        y[i] = (weight @ values).transpose(0, 1)
    return (y * gate.sigmoid()).reshape(B, T, heads * D), k_out, v_out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T,H,D]; dimension j < R/2 turns with dimension j + R/2, the rest pass through."""
    half = cos.shape[1]
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat([first * c - second * s, second * c + first * s, x[..., 2 * half :]], dim=-1)


def _fake(
    q_gate: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _ = k.shape
    return k.new_empty(B, T, heads * q_norm.shape[0]), torch.empty_like(k_cache), torch.empty_like(v_cache)


gated_attention = define("gated_attention", ("y", "k_cache_out", "v_cache_out"), _body, _fake)
