"""The gated delta rule over a whole sequence, as batched matrix products that autograd and torch.compile handle.

Per head: S_t = e^{g_t} S_{t-1} + k_t (beta_t (v_t - (e^{g_t} S_{t-1})^T k_t))^T, o_t = S_t^T q_t. Inside a chunk of C tokens the updates
are solved together (the WY form); over a chunk the state changes by an affine map S -> M S + N, and a parallel scan composes these maps, so
no step of the program runs once per chunk. Kernels written for this exist, but their backward pass is not available on every GPU and
Triton version; this form needs nothing but PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


class UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 for strictly lower triangular A [..., C, C], by merging inverted diagonal blocks of doubling size."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        size = a.shape[-1]
        row = torch.arange(size, device=a.device)
        inverse = torch.eye(size, dtype=a.dtype, device=a.device).expand_as(a)
        block = 1
        while block < size:
            # The lower left quarter of every diagonal block of twice the size.
            pair = (row[:, None] // (2 * block) == row // (2 * block)) & (row[:, None] // block > row // block)
            inverse = inverse - inverse @ (a * pair) @ inverse
            block *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return (-(inverse.mT @ grad @ inverse.mT)).tril(-1)


def states_before_chunks(m: Tensor, n: Tensor) -> Tensor:
    """State that each chunk starts from, for S_c = M_c S_{c-1} + N_c and a zero first state. m [...,N,Dk,Dk], n [...,N,Dk,Dv]."""
    dk, count = m.shape[-1], m.shape[-3]
    both = torch.cat((m, n), -1)
    shift = 1
    while shift < count:
        later, earlier = both[..., shift:, :, :], both[..., :-shift, :, :]
        composed = later[..., :dk] @ earlier
        composed = composed + F.pad(later[..., dk:], (dk, 0))
        both = torch.cat((both[..., :shift, :, :], composed), -3)
        shift *= 2
    return F.pad(both[..., :-1, :, dk:], (0, 0, 0, 0, 1, 0))


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """q, k [B,T,H,Dk] (L2-normalized here), v [B,T,H,Dv], g (log decay) and beta [B,T,H] -> [B,T,H,Dv] in v's dtype; computed in fp32."""
    with torch.autocast(q.device.type, enabled=False):
        _, t, _, dk = q.shape
        size = t if t <= 2 * CHUNK else CHUNK
        pad = -t % size

        def chunks(x: Tensor) -> Tensor:
            return F.pad(x.float().transpose(1, 2), (0, 0, 0, pad)).unflatten(2, (-1, size))

        q, k, values, g, beta = chunks(q), chunks(k), chunks(v), chunks(g[..., None]).cumsum(-2), chunks(beta[..., None])
        q = q * torch.rsqrt(q.pow(2).sum(-1, keepdim=True) + 1e-6) * dk**-0.5
        k = k * torch.rsqrt(k.pow(2).sum(-1, keepdim=True) + 1e-6)
        row = torch.arange(size, device=q.device)
        decay = (g - g.mT).masked_fill(row[:, None] < row, -torch.inf).exp()
        grown, last = g.exp(), g[..., -1:, :]
        weighted = k * beta
        inverse = UnitLowerInverse.apply((weighted @ k.mT * decay).tril(-1))
        u = inverse @ (values * beta)
        if q.shape[-3] == 1:  # Short sequences are one chunk, which starts from an empty state: a third of the work.
            return ((q @ k.mT * decay) @ u).flatten(2, 3)[:, :, :t].transpose(1, 2).to(v.dtype)
        w = inverse @ (weighted * grown)
        carried = (k * (last - g).exp()).mT
        eye = torch.eye(dk, device=q.device)
        state = states_before_chunks(last.exp() * eye - carried @ w, carried @ u)
        out = (q * grown) @ state + (q @ k.mT * decay) @ (u - w @ state)
        return out.flatten(2, 3)[:, :, :t].transpose(1, 2).to(v.dtype)
