"""Attention of a few queries over a long cache, whose slots are read in parts by several blocks of threads.

Two products with a softmax between are one kernel of TensorRT's, with as many blocks as there are key heads: right for a prompt, and two
blocks for the 4600 slots of a 0.8B. This form is not recognized as that kernel.

    s = [K q^T, K_new q^T]     w = softmax(s + mask)     o = sum over parts p of w_p V_p  +  w_new V_new

K and V are the slots before this call, K_new and V_new its own tokens, which are one part more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from qwen_export.plugins.decompose.decompose_attention import MASKED, AttentionSizes, bias_of
from qwen_export.plugins.emitter import Emitter

MOST_ROWS = 64
"""Rows of a head, queries that share it times tokens, up to which a prompt's kernel would have too few blocks."""
_SLOTS = 128


class Keys(NamedTuple):
    """Keys and values: of the slots before a call, [1,Hkv,S,D], of which the first `length` count, and of its own tokens, [1,Hkv,T,D]."""

    k: ir.Value | None
    v: ir.Value | None
    k_new: ir.Value
    v_new: ir.Value
    length: ir.Value | None


def attend_in_parts(emit: Emitter, q: ir.Value, keys: Keys, sizes: AttentionSizes, activation: ir.DataType) -> ir.Value:
    """`attend` for up to MOST_ROWS rows: q [1,Hq,T,D] -> f32[1,T,Hq*D]."""
    T, S, Hq, Hkv, D = sizes.T, sizes.S, sizes.Hq, sizes.Hkv, sizes.D
    rows, parts = Hq // Hkv * T, S // slots_of_a_part(S)
    grouped = emit.reshape(q, 1, Hkv, rows, D)
    # K comes first: a product reads its left matrix in place, and transposes the right one.
    score = emit.wide(emit.transpose(emit.matmul(keys.k, emit.transpose(grouped, 0, 1, 3, 2)), 0, 1, 3, 2))
    old = emit.shared("old_slots", lambda: _old_slots(emit, keys.length, S))
    both = emit.concat([emit.add(score, old), _own_scores(emit, grouped, keys.k_new, sizes)], axis=3)
    (weight,) = emit("", "Softmax", [both], like=both, axis=-1)
    weight, own = emit.split(weight, [S, T], axis=3)
    split = emit.reshape(emit.cast(weight, activation), 1, Hkv, rows, parts, S // parts)
    o = emit.matmul(emit.transpose(split, 0, 1, 3, 2, 4), emit.reshape(keys.v, 1, Hkv, parts, S // parts, D))
    last = emit.reshape(_own_values(emit, own, keys.v_new, sizes), 1, Hkv, 1, rows, D)
    total = _sum(emit, emit.concat([emit.wide(o), last], axis=2), 2)
    return emit.reshape(emit.transpose(emit.reshape(total, 1, Hq, T, D), 0, 2, 1, 3), 1, T, Hq * D)


def slots_of_a_part(S: int) -> int:
    """The largest divisor of S that is at most 128."""
    return max(size for size in range(1, _SLOTS + 1) if S % size == 0)


def _old_slots(emit: Emitter, length: ir.Value | None, S: int) -> ir.Value:
    """f32[S]: 0 for slots of earlier calls, a large negative number behind them."""
    (old,) = emit("", "Less", [emit.positions(S), length], dtype=ir.DataType.BOOL)
    return bias_of(emit, old)


def _own_scores(emit: Emitter, q: ir.Value, k: ir.Value, sizes: AttentionSizes) -> ir.Value:
    """q [1,Hkv,rows,D] with the call's own keys: f32[1,Hkv,rows,T], a token and those before it. Sums: a product would be a kernel more."""
    T, Hkv, D = sizes.T, sizes.Hkv, sizes.D
    rows = sizes.Hq // Hkv * T
    left, right = emit.reshape(emit.wide(q), 1, Hkv, rows, 1, D), emit.reshape(emit.wide(k), 1, Hkv, 1, T, D)
    score = _sum(emit, emit.mul(left, right), 4)
    if T == 1:
        return score
    token = np.tile(np.arange(T), sizes.Hq // Hkv)[:, None]
    mask = np.where(np.arange(T) <= token, 0, MASKED).astype(np.float32)
    return emit.add(score, emit.array(f"own_tokens_{rows}_{T}", mask))


def _own_values(emit: Emitter, weight: ir.Value, v: ir.Value, sizes: AttentionSizes) -> ir.Value:
    """weight f32[1,Hkv,rows,T] times the call's own values: f32[1,Hkv,rows,D]."""
    T, Hkv, D = sizes.T, sizes.Hkv, sizes.D
    if T == 1:
        return emit.mul(weight, emit.wide(v))
    columns = emit.reshape(weight, 1, Hkv, sizes.Hq // Hkv * T, T, 1)
    return _sum(emit, emit.mul(columns, emit.reshape(emit.wide(v), 1, Hkv, 1, T, D)), 3)


def _sum(emit: Emitter, x: ir.Value, axis: int) -> ir.Value:
    return emit("", "ReduceSum", [x, emit.ints(axis)], like=x, keepdims=0)[0]
