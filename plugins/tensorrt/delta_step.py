"""gated_delta_net over one token, as sums along the rows of a turned state: three kernels of TensorRT's, one of which reads and writes it.

    u = beta (v - e^g f_k S k)      S_1 = e^g S + f_k u k^T      o = e^g f_q S q + f_k f_q (q . k) u

S is [Dv,Dk], so that everything a block needs for its rows lies in these rows: the sums over them, then u, then the rows written anew. With
[Dk,Dv] the sums end before the new state begins, in another kernel that reads it again. q and k are those of the convolution, their norms'
factors f_q and f_k are applied to the sums: what normalises them would be a kernel between the convolution and the state.
Products of one row are neither faster nor, where products are rounded to TF32, as exact.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from qwen_export.plugins.decompose import gated_delta_net as delta_net
from qwen_export.plugins.decompose.emitter import Emitter
from qwen_export.plugins.ops.gated_delta_net import L2_EPS


class Step(NamedTuple):
    """One token, fp32. R = Hv / Hk value heads share a key head.

    q, k [1,Hk,1,1,Dk], their factors [1,Hk,1,1,1], v [1,Hk,R,Dv,1], decay = e^g and beta [1,Hk,R,1,1], state [1,Hk,R,Dv,Dk]."""

    q: ir.Value
    k: ir.Value
    q_factor: ir.Value
    k_factor: ir.Value
    v: ir.Value
    decay: ir.Value
    beta: ir.Value
    state: ir.Value


def emit_step(
    emit: Emitter, given: dict[str, ir.Value | None], sizes: delta_net.Sizes, eps: float, activation: ir.DataType
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """`emit_gated_delta_net` for T = 1 without pending tokens, state and state' turned, [1,Hv,Dv,Dk]."""
    Hk, Hv, Dk, Dv = sizes.Hk, sizes.Hv, sizes.Dk, sizes.Dv
    rows = emit.concat([given["conv_history"], given["qkv"]], axis=1)
    u = delta_net.conv_silu(emit, emit.wide(rows), delta_net.taps(emit, given, sizes.K), 1)
    q, k, v = emit.split(u, [Hk * Dk, Hk * Dk, Hv * Dv], axis=2)
    q, k = (emit.reshape(x, 1, Hk, 1, 1, Dk) for x in (q, k))
    g, beta = delta_net.gates(emit, given, emit.wide(given["a"]), emit.wide(given["b"]), sizes)
    heads = (1, Hk, Hv // Hk)
    o, state = step(
        emit,
        Step(
            q,
            k,
            _factor(emit, q, Dk**-0.5),
            _factor(emit, k, 1.0),
            emit.reshape(v, *heads, Dv, 1),
            emit.reshape(emit.exp(g), *heads, 1, 1),
            emit.reshape(beta, *heads, 1, 1),
            emit.reshape(given["state"], *heads, Dv, Dk),
        ),
    )
    y = delta_net.gated_norm(emit, emit.reshape(o, 1, 1, Hv, Dv), given, sizes, eps)
    return emit.cast(y, activation), emit.rows(rows, 1, sizes.K, axis=1), emit.reshape(state, 1, Hv, Dv, Dk)


def step(emit: Emitter, given: Step) -> tuple[ir.Value, ir.Value]:
    """o [1,Hk,R,Dv,1] and the state afterwards."""
    q, k, q_factor, k_factor, v, decay, beta, state = given
    read_k = emit.mul(emit.mul(_sum(emit, emit.mul(state, k)), decay), k_factor)
    read_q = emit.mul(emit.mul(_sum(emit, emit.mul(state, q)), decay), q_factor)
    u = emit.mul(beta, emit.sub(v, read_k))
    own = emit.mul(_sum(emit, emit.mul(q, k)), emit.mul(k_factor, q_factor))
    return emit.add(read_q, emit.mul(own, u)), emit.add(emit.mul(state, decay), emit.mul(emit.mul(u, k_factor), k))


def _factor(emit: Emitter, x: ir.Value, scale: float) -> ir.Value:
    """scale / sqrt(|x|^2 + eps) over the last axis."""
    (root,) = emit("", "Sqrt", [emit.add(_sum(emit, emit.mul(x, x)), emit.scalar(L2_EPS))], like=x)
    return emit("", "Div", [emit.scalar(scale), root], like=x)[0]


def _sum(emit: Emitter, x: ir.Value) -> ir.Value:
    return emit("", "ReduceSum", [x, emit.ints(-1)], like=x, keepdims=1)[0]
