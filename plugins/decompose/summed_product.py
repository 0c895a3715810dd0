"""Products as sums over element-wise products: exact in fp32 on compilers that round the operands of products to TF32. For few rows:
a sum reads its operands again for every row and column.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.plugins.emitter import Emitter


class SummedEmitter(Emitter):
    """An emitter whose fp32 products are sums."""

    def matmul(self, a: ir.Value | None, b: ir.Value | None) -> ir.Value:
        if a is None or b is None or a.dtype != ir.DataType.FLOAT:
            return super().matmul(a, b)
        (columns,) = self("", "Unsqueeze", [a, self.ints(-1)], like=a)
        (rows,) = self("", "Unsqueeze", [b, self.ints(-3)], like=b)
        return self("", "ReduceSum", [self.mul(columns, rows), self.ints(-2)], like=a, keepdims=0)[0]
