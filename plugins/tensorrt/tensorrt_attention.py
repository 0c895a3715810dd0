"""gated_attention in native layers: RotaryEmbedding, KVCacheUpdate (TensorScatter) and Attention.

Norm and rotation are fp32: the compiler fuses them with the casts around them, and tables in fp16 would shift the angles of late positions.
The attention layer exists for fp16 and bf16, and its form for one query does not compile in TensorRT-RTX 1.5 (an internal check of the
kernel generator fails); a few queries read the cache part by part instead (`attend_in_parts.py`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_export.manifest import READ_AGAIN
from qwen_export.plugins.decompose.decompose_attention import AttentionSizes, Layer, attend, new_slots
from qwen_export.plugins.decompose.decompose_norm import norm_weight
from qwen_export.plugins.emitter import Emitter
from qwen_export.plugins.tensorrt.attend_in_parts import MOST_ROWS, Keys, attend_in_parts


def emit_native_attention(emit: Emitter, layer: Layer, *, fused: bool) -> tuple[ir.Value, ir.Value, ir.Value]:
    """y [1,T,Hq*D] and the caches, in the memory of the given ones; `fused`: with the attention layer where it can be."""
    given, sizes, activation = layer.given, layer.sizes, layer.activation
    T, Hq, Hkv, D = sizes.T, sizes.Hq, sizes.Hkv, sizes.D

    few = Hq // Hkv * T <= MOST_ROWS
    query, key = _heads(emit, layer, together=few)
    value = emit.transpose(emit.reshape(given["v"], 1, T, Hkv, D), 0, 2, 1, 3)
    k_cache, v_cache = _write(emit, given, key, value)
    if few:
        # The call's own rows are read back out of the cache: where nothing does, TensorRT-RTX 1.5 and 1.7 fuse the writes with the last
        # kernel of the layer, one block of threads, or crash over it (a segmentation fault in fp32).
        slots = new_slots(emit, given["length"], sizes)
        own_k, own_v = (emit.gather(cache, slots, axis=2) for cache in (k_cache, v_cache))
        keys = Keys(read_again(emit, given["k_cache"]), read_again(emit, given["v_cache"]), own_k, own_v, given["length"])
        o = attend_in_parts(emit, query, keys, sizes, activation)
        return emit.cast(emit.mul(o, emit.sigmoid(emit.wide(layer.gate))), activation), k_cache, v_cache
    if fused:
        mask = emit.shared(f"seen_{T}_{sizes.S}", lambda: _seen(emit, given["length"], sizes))
        (o,) = emit("", "Attention", [query, k_cache, v_cache, mask], like=query, scale=1.0)
        o = emit.reshape(emit.transpose(o, 0, 2, 1, 3), 1, T, Hq * D)
    else:
        o = attend(emit, query, k_cache, v_cache, given["length"], sizes, activation)
    return emit.mul(o, emit.sigmoid(layer.gate)), k_cache, v_cache


def _write(emit: Emitter, given: dict[str, ir.Value | None], key: ir.Value, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The caches with the new rows written in place."""
    start = emit.shared("first_slot", lambda: _first_slot(emit, given["length"]))

    def write(cache: ir.Value | None, new: ir.Value) -> ir.Value:
        return emit("", "TensorScatter", [cache, new, start], like=new, axis=-2, mode="linear")[0]

    return write(given["k_cache"], key), write(given["v_cache"], value)


def read_again(emit: Emitter, cache: ir.Value | None) -> ir.Value:
    """A second input that is bound to the memory of a cache. TensorRT copies a cache that it writes in place before a product reads it,
    all slots in every call. Through this input a call reads slots that it does not write, so the order of the two does not matter."""
    if cache is None or cache.shape is None or cache.dtype is None:
        raise TypeError("gated_attention has no cache")
    again = ir.Value(name=f"{cache.name}{READ_AGAIN}", shape=cache.shape, type=ir.TensorType(cache.dtype))
    emit.graph.inputs.append(again)
    return again


def _heads(emit: Emitter, layer: Layer, *, together: bool) -> tuple[ir.Value, ir.Value]:
    """Normalized and rotated queries [1,Hq,T,D] and keys [1,Hkv,T,D]. `together`: in one kernel instead of two, for calls that read both:
    of a prompt's last layer only the keys are needed."""
    given, sizes = layer.given, layer.sizes

    def normed(x: ir.Value | None, count: int) -> ir.Value:
        heads = emit.reshape(emit.wide(x), 1, sizes.T, count, sizes.D)
        return emit.mean_square_scale(emit.transpose(heads, 0, 2, 1, 3), layer.eps)

    if together:
        both = normed(emit.concat([layer.q, given["k"]], axis=2), sizes.Hq + sizes.Hkv)
        q, k = emit.split(both, [sizes.Hq, sizes.Hkv], axis=1)
    else:
        q, k = normed(layer.q, sizes.Hq), normed(given["k"], sizes.Hkv)

    def rotated(x: ir.Value, weight: ir.Value) -> ir.Value:
        return emit.cast(_rotate(emit, emit.mul(x, weight), given, sizes), layer.activation)

    # The rotation is linear: the scale of the scores goes into the norm's weight, where fp16 queries stay small.
    scaled = norm_weight(emit, given["q_norm"], 1.0, sizes.D**-0.5)
    return rotated(q, scaled), rotated(k, norm_weight(emit, given["k_norm"], 1.0))


def _rotate(emit: Emitter, x: ir.Value, given: dict[str, ir.Value | None], sizes: AttentionSizes) -> ir.Value:
    """x f32[1,H,T,D], rotated by the rows of the tables that belong to the new slots."""
    cos, sin = (emit.shared(f"{name}_rows_3d", lambda name=name: _rows(emit, given, name, sizes)) for name in ("cos", "sin"))  # type: ignore[misc]
    return emit("", "RotaryEmbedding", [x, cos, sin], like=x, rotary_embedding_dim=sizes.R, interleaved=0)[0]


def _rows(emit: Emitter, given: dict[str, ir.Value | None], name: str, sizes: AttentionSizes) -> ir.Value:
    """Rows length .. length+T-1 of a table f32[S,R/2] -> [1,T,R/2]."""
    taken = emit.gather(given[name], new_slots(emit, given["length"], sizes), axis=0)
    rows = emit.reshape(emit.wide(taken), 1, sizes.T, sizes.R // 2)
    # TensorRT-RTX 1.7.1 does not compile prompts of 12 and more layers where the rotation reads the gather itself ("uses before defs").
    (apart,) = emit("", "Max", [rows, rows], like=rows)
    return apart


def _first_slot(emit: Emitter, length: ir.Value | None) -> ir.Value:
    return emit.cast(length, ir.DataType.INT64)


def _seen(emit: Emitter, length: ir.Value | None, sizes: AttentionSizes) -> ir.Value:
    """bool[1,1,T,S]: token t sees slots 0 .. length+t."""
    own = emit.add(emit.array(f"row_{sizes.T}", np.arange(sizes.T, dtype=np.int32)[:, None]), length)
    (seen,) = emit("", "LessOrEqual", [emit.positions(sizes.S), own], dtype=ir.DataType.BOOL)
    return emit("", "Reshape", [seen, emit.ints(1, 1, sizes.T, sizes.S)], dtype=ir.DataType.BOOL)[0]
