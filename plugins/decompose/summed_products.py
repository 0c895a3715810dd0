"""The gated delta rule over a few tokens without matrix products: for verifies, on compilers that round the operands of fp32 products.

The equations are those of `delta_rule`. Products become sums over element-wise products, which compilers keep in fp32 and fuse, and the
triangular system is solved from the top,

    u_i = beta_i (v_i - c_i S_0^T k_i) - sum_{j<i} A_ij u_j

which is a chain of element-wise operations on vectors of a head: for a few tokens it is one kernel.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwen_export.plugins.decompose.emitter import Emitter


def summed_products(
    emit: Emitter,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    g: ir.Value,
    beta: ir.Value,
    state: ir.Value,
    length: int,
    keep: ir.Value | None = None,
) -> tuple[ir.Value, ir.Value]:
    """As `delta_rule`; work and code grow with the square of `length`."""
    H, Dk, Dv = (int(size) for size in state.shape[1:]) if state.shape is not None else (0, 0, 0)
    L = length
    lower = np.tril(np.ones((L, L), np.float32))

    def ranges(name: str, mask: npt.NDArray[np.float32], x: ir.Value) -> ir.Value:
        """Sums of x f32[1,H,L] over the ranges that the rows of a mask [rows,L] say -> [1,H,rows]."""
        (total,) = emit("", "ReduceSum", [emit.mul(emit.reshape(x, 1, H, 1, L), emit.array(name, mask)), emit.ints(-1)], like=x, keepdims=0)
        return total

    flat = emit.reshape(g, 1, H, L)
    # Row i*L+j: the tokens behind j up to i.
    between = np.stack([lower[i] * (np.arange(L) > j) for i in range(L) for j in range(L)])
    decay = emit.mul(
        emit.exp(emit.reshape(ranges(f"between_{L}", between.astype(np.float32), flat), 1, H, L, L)), emit.array(f"lower_{L}", lower)
    )
    since_start = emit.exp(emit.reshape(ranges(f"until_{L}", lower, flat), 1, H, L, 1))

    def summed(a: ir.Value, b: ir.Value, axis: int) -> ir.Value:
        return emit("", "ReduceSum", [emit.mul(a, b), emit.ints(axis)], like=a, keepdims=0)[0]

    rows, others = emit.concat([k, q], axis=2), emit.reshape(k, 1, H, 1, L, Dk)
    scores = summed(emit.reshape(rows, 1, H, 2 * L, 1, Dk), others, 4)
    read = summed(emit.reshape(rows, 1, H, 2 * L, Dk, 1), emit.reshape(state, 1, H, 1, Dk, Dv), 3)
    k_scores, q_scores = emit.split(scores, [L, L], axis=2)
    k_read, q_read = emit.split(read, [L, L], axis=2)
    A = emit.mul(emit.mul(k_scores, decay), beta)
    M = emit.mul(q_scores, decay)
    wanted = emit.mul(beta, emit.sub(v, emit.mul(since_start, k_read)))
    u = _solved(emit, A, wanted, H, Dv, L)
    u_rows = emit.reshape(u, 1, H, 1, L, Dv)
    o = emit.add(emit.mul(since_start, q_read), summed(emit.reshape(M, 1, H, L, L, 1), u_rows, 3))

    kept = flat if keep is None else emit.mul(flat, emit.reshape(keep, 1, 1, L))
    until_end = emit.exp(emit.reshape(ranges(f"behind_{L}", np.triu(lower.T, 1), kept), 1, H, L, 1))
    weight = until_end if keep is None else emit.mul(until_end, keep)
    (total,) = emit("", "ReduceSum", [kept, emit.ints(-1)], like=kept, keepdims=1)
    added = summed(emit.reshape(emit.mul(k, weight), 1, H, L, Dk, 1), emit.reshape(u, 1, H, L, 1, Dv), 2)
    return o, emit.add(emit.mul(state, emit.reshape(emit.exp(total), 1, H, 1, 1)), added)


def _solved(emit: Emitter, A: ir.Value, wanted: ir.Value, H: int, Dv: int, L: int) -> ir.Value:
    """u [1,H,L,Dv] of (I + A) u = wanted, A strictly lower triangular: entries on and above the diagonal are not read."""
    right = emit.split(wanted, [1] * L, axis=2) if L > 1 else (wanted,)
    entries = emit.split(emit.reshape(A, 1, H, L * L, 1), [1] * (L * L), axis=2) if L > 1 else ()
    solved: list[ir.Value] = []
    for i in range(L):
        value = right[i]
        for j in range(i):
            value = emit.sub(value, emit.mul(entries[i * L + j], solved[j]))
        solved.append(value)
    return emit.concat(solved, axis=2) if L > 1 else solved[0]
