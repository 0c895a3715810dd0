"""Element types of tensors, by the names that each format has for them. The one table; nothing here loads a library until it is asked for.

short        in options, reports and plans: fp32
safetensors  in the header of a checkpoint: F32
onnx         in graphs, `onnx_ir.DataType[...]`; in lower case in manifests: FLOAT, float
numpy        in memory; types that numpy has not are those of ml_dtypes: float32
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ElementType:
    """One type. "" for a name that a format does not have."""

    short: str
    safetensors: str
    onnx: str
    numpy: str
    bits: int

    @property
    def manifest(self) -> str:
        return self.onnx.lower()

    def dtype(self) -> np.dtype[Any]:
        """The type in numpy. Loads ml_dtypes for the types that numpy has not. Raises TypeError for a type without a numpy name."""
        import numpy as np

        if not self.numpy:
            raise TypeError(f"{self.short} has no numpy type")
        if hasattr(np, self.numpy):
            return np.dtype(self.numpy)
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, self.numpy))


FP32 = ElementType("fp32", "F32", "FLOAT", "float32", 32)
FP16 = ElementType("fp16", "F16", "FLOAT16", "float16", 16)
BF16 = ElementType("bf16", "BF16", "BFLOAT16", "bfloat16", 16)

ELEMENT_TYPES = (
    FP32,
    FP16,
    BF16,
    ElementType("fp64", "F64", "DOUBLE", "float64", 64),
    ElementType("fp8 e4m3", "F8_E4M3", "FLOAT8E4M3FN", "float8_e4m3fn", 8),
    ElementType("fp8 e5m2", "F8_E5M2", "FLOAT8E5M2", "float8_e5m2", 8),
    ElementType("fp8 e8m0", "F8_E8M0", "FLOAT8E8M0", "float8_e8m0fnu", 8),
    ElementType("int64", "I64", "INT64", "int64", 64),
    ElementType("int32", "I32", "INT32", "int32", 32),
    ElementType("int16", "I16", "INT16", "int16", 16),
    ElementType("int8", "I8", "INT8", "int8", 8),
    ElementType("uint64", "U64", "UINT64", "uint64", 64),
    ElementType("uint32", "U32", "UINT32", "uint32", 32),
    ElementType("uint16", "U16", "UINT16", "uint16", 16),
    ElementType("uint8", "U8", "UINT8", "uint8", 8),
    ElementType("bool", "BOOL", "BOOL", "bool_", 8),
    ElementType("int4", "", "INT4", "int4", 4),
    ElementType("uint4", "", "UINT4", "uint4", 4),
    ElementType("fp4 e2m1", "", "FLOAT4E2M1", "float4_e2m1fn", 4),
)

PLAIN = (FP32, FP16, BF16)
"""The types of weights that are not quantized, and of activations."""

BY_SHORT = {kind.short: kind for kind in ELEMENT_TYPES}
BY_SAFETENSORS = {kind.safetensors: kind for kind in ELEMENT_TYPES if kind.safetensors}
BY_MANIFEST = {kind.manifest: kind for kind in ELEMENT_TYPES}


def stored_bytes(name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor in a file of a bundle; `name` is its type in manifests. Elements of four bits are packed. Raises KeyError."""
    return -(-prod(shape) * BY_MANIFEST[name].bits // 8)
