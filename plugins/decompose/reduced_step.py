"""One token of the gated delta rule as sums over the state instead of matrix products.

    u = beta (v - e^g S^T k)      S_1 = e^g S + k u^T      o = e^g S^T q + (q . k) u

Both sums read the state as it was, so a compiler that fuses element-wise layers into reductions reads it once for the sums and once to
write the new one; the decay is applied to the sums, or it would be a state of its own in between. Products of one row are neither faster
nor, where products are rounded to TF32, as exact.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.plugins.decompose.delta_rule import Recurrence, delta_rule
from qwen_export.plugins.emitter import Emitter


def reduced_step(emit: Emitter, given: Recurrence) -> tuple[ir.Value, ir.Value]:
    """`delta_rule` for calls of one token; longer ones take the chunk form."""
    q, k, v, g, beta, state, length, keep = given
    if length > 1 or keep is not None:
        return delta_rule(emit, given)
    decay = emit.exp(g)
    q_column, k_column = emit.transpose(q, 0, 1, 3, 2), emit.transpose(k, 0, 1, 3, 2)

    def over_keys(x: ir.Value) -> ir.Value:
        (total,) = emit("", "ReduceSum", [emit.mul(state, x), emit.ints(2)], like=x, keepdims=1)
        return emit.mul(total, decay)

    u = emit.mul(beta, emit.sub(v, over_keys(k_column)))
    (shared,) = emit("", "ReduceSum", [emit.mul(q, k), emit.ints(3)], like=q, keepdims=1)
    o = emit.add(over_keys(q_column), emit.mul(shared, u))
    return o, emit.add(emit.mul(state, decay), emit.mul(k_column, u))
