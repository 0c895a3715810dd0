"""qwen::picture_attention, attention of the vision tower: every patch of a slice sees every other.

    q | k | v = qkv             each head-major
    q, k      = RoPE(q), RoPE(k)            rotate-half over the whole head, in fp32
    y         = softmax(q k^T / sqrt(D)) v              no mask, fp32 softmax

(Qwen3.5 reference: Qwen3_5VisionAttention.) A slice is a picture, or two frames of a video; slices do not see each other. Rows of cos and
sin belong to patches, and are the same in all slices of a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_export.graphs.ops.op_schema import define


def _body(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """qkv [B,L,3*Hq*D]  cos, sin f32[K,M,D/2], L = K*M -> y [B,L,Hq*D]."""
    B, L, width = qkv.shape
    D = width // (3 * heads)
    q, k, v = qkv.reshape(B, L, 3, heads, D).permute(2, 0, 3, 1, 4)
    cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    y = torch.empty_like(v)
    for b in range(B):
        for h in range(heads):  # scores of one head at a time: of all they would be the largest tensor by far
            weight = ((q[b, h] @ k[b, h].T) * D**-0.5).to(wide).softmax(-1).to(v.dtype)
            y[b, h] = weight @ v[b, h]
    return y.transpose(1, 2).reshape(B, L, heads * D)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B,Hq,L,D]: dimension j < D/2 turns with dimension j + D/2."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _fake(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


picture_attention = define("picture_attention", ("y",), _body, _fake)
