"""Exact fp32 products on compilers that round their operands to TF32, 11 bits, whatever their flags are.

    a = h + l,  h = bf16(a),  l = a - h         a b = [h_a; l_a] [h_b, l_b], the four blocks added up

h has 8 bits and passes unchanged; l has 16, of which 11 pass: what is lost is 2^-19 of an entry, against 2^-11. One product of twice the
rows and columns. A matrix that the checkpoint stores in BF16 or FP16 needs no splitting.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.plugins.emitter import Emitter


class SplitEmitter(Emitter):
    """An emitter whose fp32 products are split."""

    def matmul(self, a: ir.Value | None, b: ir.Value | None) -> ir.Value:
        if a is None or b is None or a.dtype != ir.DataType.FLOAT:
            return super().matmul(a, b)
        wide = self.concat([*split(self, b)], axis=-1)
        upper, lower = _halves(self, super().matmul(self.concat([*split(self, a)], axis=-2), wide), axis=-2)
        return self.add(*_halves(self, self.add(upper, lower), axis=-1))


def split(emit: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """h and l of x."""
    high = emit.wide(emit.cast(x, ir.DataType.BFLOAT16))
    return high, emit.sub(x, high)


def _halves(emit: Emitter, x: ir.Value, axis: int) -> tuple[ir.Value, ...]:
    return emit("", "Split", [x], 2, like=x, axis=axis, num_outputs=2)
