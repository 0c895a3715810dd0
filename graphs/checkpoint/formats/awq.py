"""AWQ, `gemm` layout: `X.qweight` i32[I, O/8], `X.qzeros` i32[G, O/8], `X.scales` f16[G, O].

A word has eight outputs; the lowest four bits are output 0, then 2, 4, 6, 1, 3, 5, 7. Without `zero_point` the zero points are 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export.graphs.checkpoint.formats.integer_codes import Bytes, IntegerTensor, unpack, zeros_of
from qwen_export.graphs.checkpoint.formats.logical_tensor import (
    FLOAT_SCALES,
    GridRows,
    LogicalTensor,
    Parts,
    Tensors,
    checked_scales,
    part,
    scales_of,
)
from qwen_export.graphs.checkpoint.formats.storage_format import Format, group_of_parts, refuse_module, unpacked_sizes
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo

_PER_WORD = 8
# The nibble of output 0, 1, ... 7 of a word.
_NIBBLE = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class AwqTensor(IntegerTensor):
    qweight: TensorInfo
    qzeros: TensorInfo | None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.qweight, self.scales, *((self.qzeros,) if self.qzeros else ()))

    def codes(self, parts: Parts, start: int, stop: int) -> GridRows:
        scales = checked_scales(self.scales, np.ascontiguousarray(parts.whole(self.scales)[:, start:stop].T))
        zeros = None
        if self.qzeros is not None:
            zeros = zeros_of(self, _outputs(parts.whole(self.qzeros), start, stop))
        return GridRows(_outputs(parts.whole(self.qweight), start, stop), scales, zeros, self.group, self.bits)


def _outputs(words: npt.NDArray[Any], start: int, stop: int) -> Bytes:
    """Codes [outputs start..stop-1, rows of the packed matrix]."""
    first = start // _PER_WORD
    nibbles = unpack(words[:, first : -(-stop // _PER_WORD)], 4)[..., _NIBBLE]
    outputs = nibbles.reshape(len(words), -1)[:, start - first * _PER_WORD : stop - first * _PER_WORD]
    return np.ascontiguousarray(outputs.T)


class Awq(Format):
    method = "awq"
    part_suffixes = (".qweight", ".qzeros", ".scales")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        version = settings.get("version") or settings.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise self.refuse("version", "'gemm'")

    def weight(self, info: TensorInfo, tensors: Tensors) -> LogicalTensor | None:
        return awq_tensor(self.method, info, tensors, self.settings) if info.name.endswith(".qweight") else None


def awq_tensor(method: str, info: TensorInfo, tensors: Tensors, settings: Mapping[str, Any]) -> AwqTensor:
    """The weight whose codes are `info`, an `X.qweight`. Bits and group follow from the shapes; `zero_point` is of the settings."""
    module = info.name.removesuffix(".qweight")
    name = module + ".weight"
    inputs, words = unpacked_sizes(info.name, info.shape)
    part(tensors, name, info.name, info.shape, ("I32",))
    stored = scales_of(tensors, name, module + ".scales")
    groups, outputs = stored.shape if len(stored.shape) == 2 else (0, 0)
    if outputs != words * _PER_WORD:
        found = f"{words * 32 // outputs} bits" if outputs and words * 32 % outputs == 0 else f"scales {stored.shape} for {info.shape}"
        raise refuse_module(method, name, found, "4 bits")
    group = group_of_parts(method, name, inputs, groups, settings.get("group_size", settings.get("q_group_size")))
    scales = part(tensors, name, module + ".scales", (groups, outputs), FLOAT_SCALES)
    qzeros = None
    if settings.get("zero_point", True) or module + ".qzeros" in tensors:
        qzeros = part(tensors, name, module + ".qzeros", (groups, words), ("I32",))
    return AwqTensor(name, (outputs, inputs), method, 4, group, qzeros is None, True, scales, info, qzeros)
