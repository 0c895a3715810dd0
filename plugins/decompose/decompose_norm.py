"""rms_norm as standard operators: fp32 statistics and product, one cast at the end."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from qwen_export.graphs.weights.expression import Offset, StoredWeight, add_weight, weight_of
from qwen_export.plugins.emitter import Emitter


def norm_weight(emit: Emitter, value: ir.Value | None, offset: float, factor: float = 1.0) -> ir.Value:
    """f32 (w + offset) * factor of a stored norm weight."""
    weight = weight_of(value)
    if value is None or not isinstance(weight, StoredWeight):
        raise TypeError("a norm has no stored weight")
    wide = replace(weight, dtype=ir.DataType.FLOAT)
    suffix = "" if factor == 1.0 else f".times_{factor:.9g}"
    return add_weight(emit.graph, f"{value.name}.scale.fp32{suffix}", Offset(wide, offset, factor))


def emit_rms_norm(emit: Emitter, x: ir.Value | None, weight: ir.Value, eps: float, activation: ir.DataType) -> ir.Value:
    """x [..., D] of any float dtype, weight f32[D] -> [..., D] of the activation dtype."""
    return emit.cast(emit.rms_norm(emit.wide(x), weight, eps), activation)
