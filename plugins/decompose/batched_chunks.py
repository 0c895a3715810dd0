"""The gated delta rule over a prompt: everything inside the chunks at once, one product per chunk in sequence.

In the notation of `delta_rule`, for each chunk of C tokens, with T = (I + A)^-1 and K_e = K * d_L:

    [W | U] = T [beta c K | beta V]          X | R = K_e^T [W | U]          (chunks are independent)
    S_{n+1} = c_L S_n - X_n S_n + R_n                                        (the only sequence)
    O_n     = (c Q - M W)_n S_n + (M U)_n          M = d * Q K^T  (j <= i)   (all chunks at once, when all S_n are known)

So a call of N chunks is a fixed number of large batched products and N products of [Dk,Dk] with [Dk,Dv] per head. The state enters and
leaves a chunk by c_L S, not through a product: what the products round does not touch what the state keeps (Gated Delta Networks, arXiv
2412.06464, section 3.3, has the form in W and U; taking the state's part out of U is what leaves one product in the sequence).

Tokens that are not kept are identity transitions here, with outputs that mean nothing: for prompts whose tail is padding, not for a
verify, which needs the outputs of tokens that it does not commit.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_export.errors import UnsupportedError
from qwen_export.plugins.decompose.delta_rule import DeltaRule, Recurrence, delta_rule
from qwen_export.plugins.decompose.triangular_inverse import unit_lower_inverse
from qwen_export.plugins.emitter import Emitter, static_shape

_LARGEST = 65504.0  # of fp16


def batched_chunks(size: int, products: ir.DataType | None = None) -> DeltaRule:
    """`delta_rule` in chunks of `size` tokens; calls must be whole chunks, or shorter than one. `products`: the dtype that operands of the
    products are rounded to, those of the inverse and of sums of g excepted; None leaves them fp32. The state is fp32 in any case."""

    def rule(emit: Emitter, given: Recurrence) -> tuple[ir.Value, ir.Value]:
        if given.length <= size:
            return delta_rule(emit, given)
        if given.length % size:
            raise UnsupportedError(
                "a prompt call is not a whole number of chunks",
                got=given.length,
                expected=f"a multiple of {size}",
                fix="Give {chunk} such a value.",
            )
        return _rule(emit, given, size, products or ir.DataType.FLOAT)

    return rule


def _rule(emit: Emitter, given: Recurrence, C: int, products: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """N chunks of C tokens of one sequence."""

    def narrow(x: ir.Value) -> ir.Value:
        if products == ir.DataType.FLOAT16:  # an infinite entry would make every later one infinite
            (x,) = emit("", "Clip", [x, emit.scalar(-_LARGEST), emit.scalar(_LARGEST)], like=x)
        return emit.cast(x, products)

    q, k, v, g, beta, state, length, keep = given
    if keep is not None:
        g, beta = emit.mul(g, keep), emit.mul(beta, keep)
    N, (_, H, Dk, Dv) = length // C, static_shape(state)
    q, k = (emit.reshape(x, H, N, C, Dk) for x in (q, k))
    v = emit.reshape(v, H, N, C, Dv)
    g, beta = (emit.reshape(x, H, N, C, 1) for x in (g, beta))
    lower = np.tril(np.ones((C, C), np.float32))
    reached, after = emit.array(f"lower_{C}", lower), emit.array(f"below_{C}", np.tril(lower, -1))

    decay = emit.mul(emit.exp(emit.matmul(reached, emit.mul(g, after))), reached)
    since_start = emit.exp(emit.matmul(reached, g))
    until_end = emit.exp(emit.matmul(emit.array(f"above_{C}", np.triu(lower.T, 1)), g))
    (sums,) = emit("", "ReduceSum", [g, emit.ints(2)], like=g, keepdims=1)
    total = emit.exp(sums)

    def product(a: ir.Value, b: ir.Value) -> ir.Value:
        return emit.wide(emit.matmul(a, b))

    k_turned = narrow(emit.transpose(k, 0, 1, 3, 2))
    A = emit.mul(emit.mul(product(narrow(k), k_turned), decay), beta)
    M = emit.mul(product(narrow(q), k_turned), decay)
    right = emit.mul(emit.concat([emit.mul(k, since_start), v], axis=3), beta)
    WU = emit.matmul(narrow(unit_lower_inverse(emit, A, C)), narrow(right))
    K_end_turned = emit.transpose(emit.mul(k, until_end), 0, 1, 3, 2)
    X, R = emit.split(emit.matmul(narrow(K_end_turned), WU), [Dk, Dv], axis=3)
    MW, MU = emit.split(emit.matmul(narrow(M), WU), [Dk, Dv], axis=3)

    S, states = emit.reshape(state, H, 1, Dk, Dv), []
    for X_n, R_n, c_n in zip(*(emit.split(x, [1] * N, axis=1) for x in (X, R, total)), strict=True):
        states.append(S)
        S = emit.sub(emit.add(emit.mul(S, c_n), emit.wide(R_n)), product(X_n, narrow(S)))
    before = narrow(emit.concat(states, axis=1))
    o = emit.wide(emit.add(emit.matmul(emit.sub(narrow(emit.mul(q, since_start)), MW), before), MU))
    return emit.reshape(o, 1, H, N * C, Dv), emit.reshape(S, 1, H, Dk, Dv)
