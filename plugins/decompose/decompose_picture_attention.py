"""picture_attention in standard nodes of fixed sizes, and a mask for the patches that fill a picture up to the size of the graph.

Queries are taken in parts, so that the scores that exist at a time are bounded whatever the number of patches.
"""

from __future__ import annotations

from math import ceil

import numpy as np
import onnx_ir as ir

from qwen_export.plugins.emitter import Emitter, static_shape

SCORE_BYTES = 128 << 20
"""Of the scores of one part, in fp32."""
_MASKED = -1e30


def emit_picture_attention(emit: Emitter, qkv: ir.Value, cos: ir.Value, sin: ir.Value, real_tokens: ir.Value, heads: int) -> ir.Value:
    """qkv [1,L,3*Hq*D], cos, sin f32[K,M,D/2] with L = K*M, real_tokens i32[1]: the first so many of the K tokens are those of the picture
    -> [1,L,Hq*D], whose rows of other tokens mean nothing."""
    (_, L, width), (K, M, half) = static_shape(qkv), static_shape(cos)
    D = 2 * half
    parts = [emit.transpose(emit.reshape(part, 1, L, heads, D), 0, 2, 1, 3) for part in emit.split(qkv, [width // 3] * 3, axis=2)]

    def row_of_patch(table: ir.Value) -> ir.Value:
        return emit.shared(f"rows.{table.name}", lambda: emit.reshape(table, 1, 1, L, half))

    def rotated(x: ir.Value) -> ir.Value:
        return _rotated(emit, x, row_of_patch(cos), row_of_patch(sin), half)

    activation = qkv.dtype or ir.DataType.FLOAT
    q = emit.cast(emit.mul(rotated(parts[0]), emit.scalar(D**-0.5)), activation)
    k = emit.cast(rotated(parts[1]), activation)
    keys = emit.transpose(k, 0, 1, 3, 2)
    mask = emit.shared("picture_mask", lambda: _mask(emit, real_tokens, K, M))
    rows = _parts(L, heads)
    made = []
    for some in [q] if len(rows) == 1 else emit.split(q, rows, axis=2):
        scores = emit.add(emit.wide(emit.matmul(some, keys)), mask)
        (weights,) = emit("", "Softmax", [scores], like=scores, axis=-1)
        made.append(emit.matmul(emit.cast(weights, activation), parts[2]))
    y = made[0] if len(made) == 1 else emit.concat(made, axis=2)
    return emit.reshape(emit.transpose(y, 0, 2, 1, 3), 1, L, heads * D)


def _parts(L: int, heads: int) -> list[int]:
    """Queries of each part."""
    size = ceil(L / ceil(4 * heads * L * L / SCORE_BYTES))
    return [min(size, L - start) for start in range(0, L, size)]


def _rotated(emit: Emitter, x: ir.Value, cos: ir.Value, sin: ir.Value, half: int) -> ir.Value:
    """x [1,Hq,L,D] in fp32: dimension j < D/2 turns with dimension j + D/2."""
    first, second = emit.split(emit.wide(x), [half, half], axis=3)
    return emit.concat(
        [emit.sub(emit.mul(first, cos), emit.mul(second, sin)), emit.add(emit.mul(second, cos), emit.mul(first, sin))], axis=3
    )


def _mask(emit: Emitter, real_tokens: ir.Value, K: int, M: int) -> ir.Value:
    """fp32 [1,1,1,L], to be added to scores: 0 for the patches of the picture, else so little that their weight is 0."""
    token = emit.array(f"token_of_patch_{K}_{M}", np.repeat(np.arange(K, dtype=np.int32), M).reshape(1, 1, 1, K * M))
    (real,) = emit("", "Less", [token, real_tokens], dtype=ir.DataType.BOOL)
    return emit("", "Where", [real, emit.scalar(0.0), emit.scalar(_MASKED)], dtype=ir.DataType.FLOAT)[0]
