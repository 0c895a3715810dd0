"""Element types of tensors in bundles, by their names in the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

BITS: dict[str, int] = {
    "float": 32,
    "float16": 16,
    "bfloat16": 16,
    "int32": 32,
    "int64": 64,
    "int8": 8,
    "uint8": 8,
    "int4": 4,
    "uint4": 4,
    "float4e2m1": 4,
    "float8e4m3fn": 8,
}
"""Bits of one element. Narrow elements are stored one after the other, the first in the low bits."""


def stored_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor in a file. Raises KeyError for an unknown type."""
    return -(-prod(shape) * BITS[dtype] // 8)
