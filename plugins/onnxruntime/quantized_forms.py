"""How the kernels of qwen.native take a quantized matrix: the ops of each form, and the initializers and attributes that are the matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import onnx_ir as ir

from qwen_export.graphs.quantization.fp8_blocks import Fp8BlockCodes, Fp8BlockScales, shared_rows
from qwen_export.graphs.quantization.packing import QuantFormat
from qwen_export.graphs.quantization.precision_plan import FP8, INT4, INT8, KEPT, GroupFormat, PrecisionPlan
from qwen_export.graphs.quantization.quantized_weights import packed_weight
from qwen_export.graphs.weights.expression import FirstRows, Weight, add_weight

Attributes = dict[str, int]


class QuantizedForm(ABC):
    """The ops of one form."""

    linear: ClassVar[str]
    swiglu: ClassVar[str]
    gather: ClassVar[str]
    moe: ClassVar[str]

    @abstractmethod
    def matrix(self, graph: ir.Graph, name: str, weight: Weight, plan: PrecisionPlan) -> tuple[list[ir.Value], Attributes]:
        """The initializers of a matrix [N,K], and the attributes of an op on it."""

    @abstractmethod
    def experts(self, graph: ir.Graph, name: str, weight: Weight, plan: PrecisionPlan) -> tuple[list[ir.Value], Attributes]:
        """The same for the matrices [E,N,K] of all experts, whose sizes are no attributes."""


class PackedForm(QuantizedForm):
    """Integers in panels of 16 rows with their scales (packing.py): one initializer."""

    linear, swiglu, gather, moe = "QuantLinear", "QuantSwiGlu", "QuantGather", "QuantMoe"

    def matrix(self, graph: ir.Graph, name: str, weight: Weight, plan: PrecisionPlan) -> tuple[list[ir.Value], Attributes]:
        chosen, format = _integers(plan, weight)
        N, K = weight.shape
        if isinstance(weight, FirstRows):  # the first panels of the whole matrix, which is stored once
            packed: Weight = FirstRows(packed_weight(weight.of, chosen), format.packed_shape(N, K)[0])
        else:
            packed = packed_weight(weight, chosen)
        return [add_weight(graph, f"{name}.{chosen.format}", packed)], format.attributes(N, K)

    def experts(self, graph: ir.Graph, name: str, weight: Weight, plan: PrecisionPlan) -> tuple[list[ir.Value], Attributes]:
        chosen, format = _integers(plan, weight)
        attributes = {key: value for key, value in format.attributes(0, 0).items() if key not in ("N", "K")}
        return [add_weight(graph, f"{name}.{chosen.format}", packed_weight(weight, chosen))], attributes


class Fp8Form(QuantizedForm):
    """Codes row after row, and scales of blocks (fp8_blocks.py)."""

    linear, swiglu, gather, moe = "Fp8Linear", "Fp8SwiGlu", "Fp8Gather", "Fp8Moe"

    def matrix(self, graph: ir.Graph, name: str, weight: Weight, plan: PrecisionPlan) -> tuple[list[ir.Value], Attributes]:
        values, attributes = self.experts(graph, name, weight, plan)
        return values, attributes | {"N": weight.shape[0], "K": weight.shape[1]}

    def experts(self, graph: ir.Graph, name: str, weight: Weight, plan: PrecisionPlan) -> tuple[list[ir.Value], Attributes]:
        whole = weight.of if isinstance(weight, FirstRows) else weight
        kept, rows = plan.of_weight(weight).method == KEPT, shared_rows(whole, lambda stored: plan.of(stored).scale_rows)
        codes: Weight = Fp8BlockCodes(whole, kept)
        scales: Weight = Fp8BlockScales(whole, kept, rows)
        if whole is not weight:  # the first rows of the whole matrix, which is stored once
            codes, scales = FirstRows(codes, weight.shape[0]), FirstRows(scales, -(-weight.shape[0] // rows))
        return [add_weight(graph, f"{name}.{FP8}", codes), add_weight(graph, f"{name}.{FP8}.scales", scales)], {"rows": rows}


def _integers(plan: PrecisionPlan, weight: Weight) -> tuple[GroupFormat, QuantFormat]:
    chosen = plan.of_weight(weight)
    if chosen.quant is None:
        raise TypeError(f"{weight.parameter} does not become integers")
    return chosen, chosen.quant


_PACKED = PackedForm()
FORMS: dict[str, QuantizedForm] = {INT4: _PACKED, INT8: _PACKED, FP8: Fp8Form()}
"""By the format of the precision plan."""
