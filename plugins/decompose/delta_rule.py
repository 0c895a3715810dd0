"""The gated delta rule over L tokens at once, in WY form, without a loop.

    S_t = e^{g_t} S_{t-1} + k_t u_t^T      u_t = beta_t (v_t - (e^{g_t} S_{t-1})^T k_t)      o_t = S_t^T q_t

With d_ij = exp(g_{j+1} + ... + g_i) and c_i = exp(g_1 + ... + g_i) the u_t solve a unit lower triangular system (Gated Delta Networks,
arXiv 2412.06464, section 3.3; Parallelizing linear transformers with the delta rule, arXiv 2406.06484):

    A_ij = beta_i d_ij k_i.k_j  (i > j)          U = (I + A)^-1 (beta * (V - c * K S_0))
    O = c * Q S_0 + (d * Q K^T) U  (j <= i)      S_L = c_L S_0 + (K * d_L)^T U

Sums of g over a range are made by adding up that range, never as a difference of two longer sums: after strong decay such a difference
has no correct digits left, and weak decay between two neighbors would be lost.

Everything is fp32. A token with beta = 0 and g = 0 is the identity transition and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from qwen_export.plugins.decompose.triangular_inverse import unit_lower_inverse
from qwen_export.plugins.emitter import Emitter


class Recurrence(NamedTuple):
    """What the rule reads: L = `length` tokens and the state before them, all fp32.

    q, k [B,H,L,Dk], v [B,H,L,Dv], g and beta [B,H,L,1], state [B,H,Dk,Dv]. `keep` [B,1,L,1], ones and then zeros: only tokens with 1 enter
    the state, though all have outputs. None keeps all."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    g: ir.Value
    beta: ir.Value
    state: ir.Value
    length: int
    keep: ir.Value | None = None

    def part(self, emit: Emitter, start: int, stop: int, state: ir.Value) -> Recurrence:
        """Tokens `start` to `stop`, read after `state`."""

        def rows(x: ir.Value) -> ir.Value:
            return emit.rows(x, start, stop, axis=2)

        q, k, v, g, beta = rows(self.q), rows(self.k), rows(self.v), rows(self.g), rows(self.beta)
        return Recurrence(q, k, v, g, beta, state, stop - start, None if self.keep is None else rows(self.keep))


DeltaRule = Callable[[Emitter, Recurrence], tuple[ir.Value, ir.Value]]
"""Emits o [B,H,L,Dv] and the state afterwards."""


def delta_rule(emit: Emitter, given: Recurrence) -> tuple[ir.Value, ir.Value]:
    """All tokens in one chunk."""
    q, k, v, g, beta, state, length, keep = given
    if length == 1 and keep is None:
        return _one_token(emit, given)
    lower = np.tril(np.ones((length, length), np.float32))
    reached = emit.array(f"lower_{length}", lower)
    after = emit.array(f"below_{length}", np.tril(lower, -1))

    k_turned = emit.transpose(k, 0, 1, 3, 2)
    decay = emit.mul(emit.exp(emit.matmul(reached, emit.mul(g, after))), reached)
    since_start = emit.exp(emit.matmul(reached, g))
    A = emit.mul(emit.mul(emit.matmul(k, k_turned), decay), beta)
    rest = emit.sub(v, emit.mul(since_start, emit.matmul(k, state)))
    u = emit.matmul(unit_lower_inverse(emit, A, length), emit.mul(beta, rest))
    within = emit.matmul(emit.mul(emit.matmul(q, k_turned), decay), u)
    o = emit.add(emit.mul(since_start, emit.matmul(q, state)), within)

    kept = g if keep is None else emit.mul(g, keep)
    until_end = emit.exp(emit.matmul(emit.array(f"above_{length}", np.triu(lower.T, 1)), kept))
    weight = until_end if keep is None else emit.mul(until_end, keep)
    (total,) = emit("", "ReduceSum", [kept, emit.ints(2)], like=g, keepdims=1)
    added = emit.matmul(emit.mul(k_turned, emit.transpose(weight, 0, 1, 3, 2)), u)
    return o, emit.add(emit.mul(state, emit.exp(total)), added)


def _one_token(emit: Emitter, given: Recurrence) -> tuple[ir.Value, ir.Value]:
    q, k, v, g, beta, state, *_ = given
    decayed = emit.mul(state, emit.exp(g))
    u = emit.mul(beta, emit.sub(v, emit.matmul(k, decayed)))
    after = emit.add(decayed, emit.mul(emit.transpose(k, 0, 1, 3, 2), u))
    return emit.matmul(q, after), after
