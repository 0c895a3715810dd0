"""qwen::moe, the routed experts of a mixture-of-experts layer.

With l the router's logits of a token, over all E experts, and K of them selected:

    p = softmax(l)        S = the K largest of p        w_e = p_e / sum of p over S
    y = sum over e in S of  w_e down_e (SiLU(gate_e x) * up_e x)                gate_e, up_e = halves of gate_up[e]

(Qwen3.5 reference: Qwen3_5MoeSparseMoeBlock.) Softmax and weights are fp32 or wider. Only selected experts are computed. Of equal
probabilities, those that torch.topk takes are selected; the result of a token does not depend on the other tokens of the call beyond
what matrix products round.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_export.graphs.ops.op_schema import define


def route(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """router_logits [N,E] -> weights [N,K] that sum to 1, of the logits' dtype, and experts i64[N,K]."""
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    weight, expert = torch.topk(router_logits.softmax(-1, dtype=wide), top_k, dim=-1)
    return (weight / weight.sum(-1, keepdim=True)).to(router_logits.dtype), expert


def _body(x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int) -> Tensor:
    """x [...,H]  router_logits [...,E]  gate_up [E,2I,H] (gate rows, then up rows)  down [E,H,I] -> y [...,H] of x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    weight, selected = route(router_logits.reshape(-1, router_logits.shape[-1]), top_k)
    y = torch.zeros_like(rows)
    for e in selected.unique().tolist():
        token, slot = torch.where(selected == e)
        gate, up = F.linear(rows[token], gate_up[e]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down[e])
        y.index_add_(0, token, (out * weight[token, slot, None]).to(y.dtype))
    return y.reshape(x.shape)


def _fake(x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int) -> Tensor:
    return torch.empty_like(x)


moe = define("moe", ("y",), _body, _fake)
