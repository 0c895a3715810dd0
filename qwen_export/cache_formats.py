"""What attention caches keep of keys and values: the one table of formats.

Every cache is one tensor [B,Hkv,S,W], a row of W elements for each token and key head. A row is complete in itself, so rows are copied,
kept and given back as bytes, whatever their format.

fp32, fp16, bf16  the values, W = D
int8              value = code * factor, a code per value in -127..127; the factor is largest |value| of the row / 127. Behind the D codes
                  are `_SCALE` bytes: the factor in fp32, then zeros, so that rows begin at multiples of what a GPU loads at a time
fp8               the values as float8 e4m3fn, to nearest; what is beyond 448 becomes 448
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_export.element_types import BF16, BY_SHORT, FP16, FP32, ElementType
from qwen_export.errors import ParameterError

_SCALE = 16


@dataclass(frozen=True)
class CacheFormat:
    """One format: its name in options, reports and manifests, the type of a cache's elements, and elements of a row behind its values."""

    name: str
    element: ElementType
    behind: int = 0

    def width(self, head_dim: int) -> int:
        """Elements of a row of `head_dim` values."""
        return head_dim + self.behind

    def row_bytes(self, head_dim: int) -> int:
        return self.width(head_dim) * self.element.bits // 8


INT8_CACHE = CacheFormat("int8", BY_SHORT["int8"], _SCALE)
FP8_CACHE = CacheFormat("fp8", BY_SHORT["fp8 e4m3"])

CACHE_FORMATS = {
    form.name: form for form in (CacheFormat("fp32", FP32), CacheFormat("fp16", FP16), CacheFormat("bf16", BF16), INT8_CACHE, FP8_CACHE)
}
"""By name."""

BY_ELEMENT = {form.element.manifest: form for form in CACHE_FORMATS.values()}
"""By the type of a state, as manifests name it."""

CACHE_PRECISIONS = ("fp16", "fp8", "int8")
"""What a build can be asked for; without a wish caches have the precision of the activations."""


def cache_format_name(activations: str, wish: str | None) -> str:
    """The name of the caches' format, where activations have this precision. Raises ParameterError for a wish that there is not."""
    if wish is not None and wish not in CACHE_PRECISIONS:
        raise ParameterError(
            "caches are not kept in this precision",
            parameter="cache_precision",
            got=wish,
            expected=", ".join(CACHE_PRECISIONS),
            fix="Choose one of these, or leave out {cache_precision}.",
        )
    return wish or activations
