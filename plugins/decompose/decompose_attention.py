"""gated_attention as standard operators: one sequence over a cache of static capacity.

New keys and values go into slots length .. length+T-1, so the capacity has room for T slots behind the last token: a padded call writes
there too. Slots at and beyond a token's own are masked, so what a padded or rejected token left behind is never read.
Rotation, scores and softmax are fp32; the two large products have the activation dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwen_export.plugins.decompose.decompose_norm import norm_weight
from qwen_export.plugins.emitter import Emitter

MASKED = -1e30


@dataclass(frozen=True)
class AttentionSizes:
    """T new tokens, S slots, R rotated dimensions of D, and the heads."""

    T: int
    S: int
    Hq: int
    Hkv: int
    D: int
    R: int


@dataclass(frozen=True)
class Layer:
    """What one qwen::gated_attention reads: its inputs by name, `length` as i32[1], and q_proj's two halves, q and gate [1,T,Hq*D]. `eps`
    is that of the head norms; results have the dtype `activation`."""

    given: dict[str, ir.Value | None]
    q: ir.Value
    gate: ir.Value
    sizes: AttentionSizes
    eps: float
    activation: ir.DataType


def emit_gated_attention(emit: Emitter, layer: Layer, write: CacheWrite) -> tuple[ir.Value, ir.Value, ir.Value]:
    """y [1,T,Hq*D] and the caches."""
    given, sizes = layer.given, layer.sizes
    q_heads, k_heads = rotated_heads(emit, layer, scale=sizes.D**-0.5)
    v_heads = emit.transpose(emit.reshape(given["v"], 1, sizes.T, sizes.Hkv, sizes.D), 0, 2, 1, 3)
    k_cache = write(emit, given["k_cache"], k_heads, given["length"], sizes)
    v_cache = write(emit, given["v_cache"], v_heads, given["length"], sizes)
    o = attend(emit, q_heads, k_cache, v_cache, given["length"], sizes, layer.activation)
    return emit.mul(o, emit.sigmoid(layer.gate)), k_cache, v_cache


def rotated_heads(emit: Emitter, layer: Layer, scale: float) -> tuple[ir.Value, ir.Value]:
    """Normalized and rotated queries [1,Hq,T,D], times `scale`, and keys [1,Hkv,T,D]."""
    given, sizes = layer.given, layer.sizes

    def heads(x: ir.Value | None, count: int, weight: ir.Value) -> ir.Value:
        split = emit.reshape(emit.wide(x), 1, sizes.T, count, sizes.D)
        normed = emit.rms_norm(split, weight, layer.eps)
        return emit.cast(_rotate(emit, emit.transpose(normed, 0, 2, 1, 3), given, sizes), layer.activation)

    # The rotation is linear: the scale of the scores goes into the norm's weight, where fp16 queries stay small.
    return (
        heads(layer.q, sizes.Hq, norm_weight(emit, given["q_norm"], 1.0, scale)),
        heads(given["k"], sizes.Hkv, norm_weight(emit, given["k_norm"], 1.0)),
    )


def _rotate(emit: Emitter, x: ir.Value, given: dict[str, ir.Value | None], sizes: AttentionSizes) -> ir.Value:
    """x f32[1,H,T,D]: dimension j < R/2 turns with dimension j + R/2."""
    half = sizes.R // 2
    cos = emit.shared("cos_rows", lambda: _table_rows(emit, given, "cos", sizes))
    sin = emit.shared("sin_rows", lambda: _table_rows(emit, given, "sin", sizes))
    parts = emit.split(x, [half, half] + ([sizes.D - sizes.R] if sizes.D > sizes.R else []), axis=3)
    first, second = parts[:2]
    turned = emit.sub(emit.mul(first, cos), emit.mul(second, sin)), emit.add(emit.mul(second, cos), emit.mul(first, sin))
    return emit.concat([*turned, *parts[2:]], axis=3)


def _table_rows(emit: Emitter, given: dict[str, ir.Value | None], name: str, sizes: AttentionSizes) -> ir.Value:
    """Rows length .. length+T-1 of a table f32[S,R/2] -> [1,1,T,R/2]."""
    taken = emit.gather(given[name], new_slots(emit, given["length"], sizes), axis=0)
    return emit.reshape(emit.wide(taken), 1, 1, sizes.T, sizes.R // 2)


def new_slots(emit: Emitter, length: ir.Value | None, sizes: AttentionSizes) -> ir.Value:
    """i32[T]: the slots of the new tokens."""
    return emit.shared("new_slots", lambda: emit.add(emit.positions(sizes.T), length))


def scatter(emit: Emitter, cache: ir.Value | None, new: ir.Value, length: ir.Value | None, sizes: AttentionSizes) -> ir.Value:
    """ScatterND: touches the new rows only, where the runtime lets output and input be one buffer."""
    slots = emit.shared(f"slots_{sizes.Hkv}", lambda: _slot_indices(emit, length, sizes))
    return emit("", "ScatterND", [cache, slots, new], like=new)[0]


def select(emit: Emitter, cache: ir.Value | None, new: ir.Value, length: ir.Value | None, sizes: AttentionSizes) -> ir.Value:
    """Where: writes the whole cache. For runtimes that have no ScatterND of the graph's opset."""
    row = emit.shared("slot_rows", lambda: emit.sub(emit.positions(sizes.S), length))
    inside = emit.shared("slot_inside", lambda: _inside(emit, row, sizes))
    nearest = emit.shared("slot_nearest", lambda: _clip(emit, row, sizes))
    return emit("", "Where", [inside, emit.gather(new, nearest, axis=2), cache], like=new)[0]


CacheWrite = Callable[[Emitter, ir.Value | None, ir.Value, ir.Value | None, AttentionSizes], ir.Value]
"""Puts new rows [1,Hkv,T,D] into a cache [1,Hkv,S,D] from slot `length` on."""


def _inside(emit: Emitter, row: ir.Value, sizes: AttentionSizes) -> ir.Value:
    """bool[S,1]: the slot is that of a new token."""
    (clipped,) = emit("", "Equal", [_clip(emit, row, sizes), row], dtype=ir.DataType.BOOL)
    return emit("", "Reshape", [clipped, emit.ints(sizes.S, 1)], dtype=ir.DataType.BOOL)[0]


def _clip(emit: Emitter, row: ir.Value, sizes: AttentionSizes) -> ir.Value:
    zero, last = emit.array("zero_i32", np.array([0], np.int32)), emit.array(f"last_{sizes.T}", np.array([sizes.T - 1], np.int32))
    (above,) = emit("", "Max", [row, zero], like=row)
    return emit("", "Min", [above, last], like=row)[0]


def _slot_indices(emit: Emitter, length: ir.Value | None, sizes: AttentionSizes) -> ir.Value:
    """i64[1,Hkv,T,3] for ScatterND: sequence, head and slot of every new row."""
    T, Hkv = sizes.T, sizes.Hkv
    where = np.zeros((1, Hkv, T, 2), np.int64)
    where[0, :, :, 1] = np.arange(Hkv)[:, None]
    # Not cast from fp32 or added as i64: 32-bit integers are what every device adds.
    slot = emit.cast(emit.reshape(new_slots(emit, length, sizes), 1, 1, T, 1), ir.DataType.INT64)
    (each,) = emit("", "Expand", [slot, emit.ints(1, Hkv, T, 1)], like=slot)
    return emit.concat([emit.array(f"heads_{Hkv}_{T}", where), each], axis=3)


def attend(
    emit: Emitter, q: ir.Value, k: ir.Value, v: ir.Value, length: ir.Value | None, sizes: AttentionSizes, activation: ir.DataType
) -> ir.Value:
    """softmax(q k^T) v, with the queries that share a key head as rows of one matrix -> [1,T,Hq*D]."""
    T, Hkv, D = sizes.T, sizes.Hkv, sizes.D
    group = sizes.Hq // Hkv
    grouped = emit.reshape(q, 1, Hkv, group * T, D)
    score = emit.wide(emit.matmul(grouped, emit.transpose(k, 0, 1, 3, 2)))
    bias = emit.shared(f"causal_{group}", lambda: causal_bias(emit, length, sizes))
    (weight,) = emit("", "Softmax", [emit.add(score, bias)], like=score, axis=-1)
    o = emit.matmul(emit.cast(weight, activation), v)
    return emit.reshape(emit.transpose(emit.reshape(o, 1, sizes.Hq, T, D), 0, 2, 1, 3), 1, T, sizes.Hq * D)


def causal_bias(emit: Emitter, length: ir.Value | None, sizes: AttentionSizes) -> ir.Value:
    """f32[group*T,S]: 0 for slots up to the token's own, a large negative number behind it."""
    group = sizes.Hq // sizes.Hkv
    own = emit.array(f"token_{group}_{sizes.T}", np.tile(np.arange(sizes.T, dtype=np.int32), group)[:, None])
    (seen,) = emit("", "LessOrEqual", [emit.positions(sizes.S), emit.add(own, length)], dtype=ir.DataType.BOOL)
    return bias_of(emit, seen)


def bias_of(emit: Emitter, seen: ir.Value) -> ir.Value:
    """What is added to scores: 0 where `seen`, a large negative number elsewhere."""
    zero, masked = emit.scalar(0.0), emit.scalar(MASKED)
    return emit("", "Where", [seen, zero, masked], like=zero)[0]
