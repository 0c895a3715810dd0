"""Gelu as simple operators: the standard has it from opset 20 on, and DirectML has no kernel of that.

exact      x/2 (1 + erf(x / sqrt 2))
tanh       x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
"""

from __future__ import annotations

from math import pi, sqrt

import numpy as np
import onnx_ir as ir

from qwen_export.plugins.emitter import Emitter


def emit_gelu(emit: Emitter, x: ir.Value, *, tanh: bool) -> ir.Value:
    """Elementwise, in x's dtype: where the cube leaves fp16, tanh is 1 or -1, as it is before."""
    dtype = x.dtype or ir.DataType.FLOAT

    def number(value: float) -> ir.Value:
        return emit.array(f"number_{value:.9g}_{dtype.name.lower()}", np.array(value, dtype.numpy()))

    if tanh:
        cube = emit.mul(emit.mul(x, x), emit.mul(x, number(0.044715)))
        (inner,) = emit("", "Tanh", [emit.mul(emit.add(x, cube), number(sqrt(2 / pi)))], like=x)
    else:
        (inner,) = emit("", "Erf", [emit.mul(x, number(sqrt(0.5)))], like=x)
    return emit.mul(emit.mul(x, number(0.5)), emit.add(inner, number(1.0)))
