"""Attention of a few queries over a long cache, whose slots are read in parts by several blocks of threads.

Two products with a softmax between are one kernel of TensorRT's, with as many blocks as there are key heads: right for a prompt, and two
blocks for the 4600 slots of a 0.8B, behind a copy of each cache. This form is not recognised as that kernel.

    s = K q^T       w = softmax(s + mask) over all slots       o = sum over parts p of  w_p V_p
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.plugins.decompose.emitter import Emitter
from qwen_export.plugins.decompose.gated_attention import Sizes, causal_bias

MOST_ROWS = 64
"""Rows of a head, queries that share it times tokens, up to which a prompt's kernel would have too few blocks."""
_SLOTS = 128


def attend_in_parts(
    emit: Emitter, q: ir.Value, k: ir.Value, v: ir.Value, length: ir.Value | None, sizes: Sizes, activation: ir.DataType
) -> ir.Value:
    """`attend` for up to MOST_ROWS rows: q [1,Hq,T,D], caches [1,Hkv,S,D] -> [1,T,Hq*D]."""
    T, S, Hq, Hkv, D = sizes.T, sizes.S, sizes.Hq, sizes.Hkv, sizes.D
    rows = Hq // Hkv * T
    # K comes first: a product reads its left matrix where it lies, and turns the right one.
    turned = emit.transpose(emit.reshape(q, 1, Hkv, rows, D), 0, 1, 3, 2)
    score = emit.wide(emit.transpose(emit.matmul(k, turned), 0, 1, 3, 2))
    bias = emit.shared(f"causal_{Hq // Hkv}", lambda: causal_bias(emit, length, sizes))
    (weight,) = emit("", "Softmax", [emit.add(score, bias)], like=score, axis=-1)
    parts = S // slots_of_a_part(S)
    split = emit.reshape(emit.cast(weight, activation), 1, Hkv, rows, parts, S // parts)
    o = emit.matmul(emit.transpose(split, 0, 1, 3, 2, 4), emit.reshape(v, 1, Hkv, parts, S // parts, D))
    (total,) = emit("", "ReduceSum", [emit.wide(o), emit.ints(2)], dtype=ir.DataType.FLOAT, keepdims=0)
    heads = emit.reshape(emit.cast(total, activation), 1, Hq, T, D)
    return emit.reshape(emit.transpose(heads, 0, 2, 1, 3), 1, T, Hq * D)


def slots_of_a_part(S: int) -> int:
    """The largest divisor of S that is at most 128."""
    return max(size for size in range(1, _SLOTS + 1) if S % size == 0)
