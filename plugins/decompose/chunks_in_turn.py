"""The gated delta rule over a prompt, chunk after chunk: what does not depend on the state for several chunks at once, then the state.

In the notation of `delta_rule`, for each chunk of C tokens, with D_ij = d_ij for j <= i and 0 above, e the decay until the chunk's end:

    A | M = D * [K; Q] K^T          T = (I + beta A)^-1 beta                      (several chunks at once)
    [P; R] = (c * [K; Q]) S         U = T (V - P)         S' = c_C S + (e * K)^T U  (in sequence)
    O = R + M U                                                                   (several chunks at once)

For CPUs: as few flops as the form has, keys and queries in one product with the state (a product copies its right-hand side into another
order first, here once for both), and as few passes over anything of a chunk's size as possible. `batched_chunks` has one product per chunk
in sequence and twice the flops; it is for GPUs.

Tokens that are not kept are identity transitions here, with outputs that mean nothing: for prompts whose tail is padding, not for a
verify, which needs the outputs of tokens that it does not commit.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_export.plugins.decompose.delta_rule import DeltaRule, Recurrence, delta_rule
from qwen_export.plugins.decompose.triangular_inverse import unit_lower_inverse_in_blocks
from qwen_export.plugins.emitter import Emitter, static_shape

_TOGETHER = 8
"""Chunks whose state-free part is computed at once: a whole call of 256 tokens, in half the nodes of two groups and less time."""
_BLOCK = 8
"""Rows of the diagonal blocks that are inverted with masks."""
_NEVER = -1e4
"""A sum of g whose exponential is 0."""


def in_chunks(size: int) -> DeltaRule:
    """`delta_rule` over `size` tokens at a time, the state handed on within the graph: for prompts, whose other operators gain from more
    tokens in a call. A shorter last chunk goes through `delta_rule`."""

    def rule(emit: Emitter, given: Recurrence) -> tuple[ir.Value, ir.Value]:
        length, state, keep = given.length, given.state, given.keep
        if length <= size:
            return delta_rule(emit, given)
        _, H, _, Dv = static_shape(state)
        whole, outputs = length - length % size, []
        kept = given if keep is None else given._replace(g=emit.mul(given.g, keep), beta=emit.mul(given.beta, keep), keep=None)
        for start in range(0, whole, _TOGETHER * size):
            stop = min(start + _TOGETHER * size, whole)
            part = kept if stop - start == length else kept.part(emit, start, stop, state)
            rows, state = _chunks(emit, part, size)
            outputs.append(emit.reshape(rows, 1, H, stop - start, Dv))
        if whole < length:
            rest, state = delta_rule(emit, given.part(emit, whole, length, state))
            outputs.append(rest)
        return (outputs[0] if len(outputs) == 1 else emit.concat(outputs, axis=2)), state

    return rule


def _chunks(emit: Emitter, given: Recurrence, C: int) -> tuple[ir.Value, ir.Value]:
    """N whole chunks of one sequence: o [H,N,C,Dv], and the state after them."""
    q, k, v, g, beta, S, length, _ = given
    N, (_, H, Dk, Dv) = length // C, static_shape(S)
    q, k = (emit.reshape(x, H, N, C, Dk) for x in (q, k))
    v, g = emit.reshape(v, H, N, C, Dv), emit.reshape(g, H * N, C)

    within, never, ends = _sums(C)
    sums = emit.add(emit.matmul(g, emit.array(f"within_chunk_{C}", within)), emit.array(f"never_{C}", never))
    D = emit.reshape(emit.exp(sums), H, N, C, C)
    to_ends = emit.exp(emit.matmul(g, emit.array(f"chunk_ends_{C}", ends)))
    c, e, total = emit.split(emit.reshape(to_ends, H, N, 3 * C + 1, 1), [2 * C, C, 1], axis=2)

    kq = emit.concat([k, q], axis=2)
    kk, qk = emit.split(emit.matmul(kq, emit.transpose(k, 0, 1, 3, 2)), [C, C], axis=2)
    A = emit.mul(emit.mul(kk, D), emit.reshape(beta, H, N, C, 1))
    A.shape = ir.Shape((H, N, C, C))
    T = emit.mul(unit_lower_inverse_in_blocks(emit, A, C, _BLOCK), emit.reshape(beta, H, N, 1, C))

    S, R, U = emit.reshape(S, H, 1, Dk, Dv), [], []
    batches = (emit.mul(kq, c), emit.mul(k, e), v, T, total)
    pieces = ([x] if N == 1 else emit.split(x, [1] * N, axis=1) for x in batches)
    for ckq_n, ek_n, v_n, T_n, total_n in zip(*pieces, strict=True):
        P_n, R_n = emit.split(emit.matmul(ckq_n, S), [C, C], axis=2)
        U.append(emit.matmul(T_n, emit.sub(v_n, P_n)))
        R.append(R_n)
        S = emit.add(emit.mul(S, total_n), emit.matmul(emit.transpose(ek_n, 0, 1, 3, 2), U[-1]))
    r, u = (x[0] if N == 1 else emit.concat(x, axis=1) for x in (R, U))
    o = emit.add(r, emit.matmul(emit.mul(qk, D), u))
    return o, emit.reshape(S, 1, H, Dk, Dv)


def _sums(C: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Constants that turn the g of a chunk [...,C] into sums over ranges by one product each: to [...,C*C], g_{j+1} + ... + g_i at (i, j),
    with what is to be added where j > i [C*C]; and to [...,3C+1], from the start to each token twice, from each to the end, and all."""
    lower = np.tril(np.ones((C, C), np.float32))
    within = np.einsum("mj,im->mij", np.tril(lower, -1), lower).reshape(C, C * C)
    never = np.triu(np.full((C, C), _NEVER, np.float32), 1).reshape(C * C)
    return within, never, np.concatenate([lower.T, lower.T, np.tril(lower, -1), np.ones((C, 1), np.float32)], axis=1)
