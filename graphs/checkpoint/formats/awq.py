"""AWQ, `gemm` layout: `X.qweight` i32[I, O/8], `X.qzeros` i32[G, O/8], `X.scales` f16[G, O].

A word has eight outputs; the lowest four bits are output 0, then 2, 4, 6, 1, 3, 5, 7. Without `zero_point` the zero points are 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.integer_codes import Bytes, IntegerTensor, unpack, zeros_of
from qwen_export.graphs.checkpoint.formats.logical_tensor import Codes, LogicalTensor, Parts, Tensors, checked_scales, part
from qwen_export.graphs.checkpoint.formats.storage_format import Format, unpacked_sizes
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo

_PER_WORD = 8
# Where output 0, 1, ... 7 of a word lies.
_NIBBLE = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class AwqTensor(IntegerTensor):
    qweight: TensorInfo
    qzeros: TensorInfo | None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.qweight, self.scales, *((self.qzeros,) if self.qzeros else ()))

    def codes(self, parts: Parts, start: int, stop: int) -> Codes:
        scales = checked_scales(self.scales, np.ascontiguousarray(parts.whole(self.scales)[:, start:stop].T))
        zeros = None
        if self.qzeros is not None:
            zeros = zeros_of(self, _outputs(parts.whole(self.qzeros), start, stop))
        return Codes(_outputs(parts.whole(self.qweight), start, stop), scales, zeros, self.group, self.bits)


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
        self.only("bits", 4)
        version = settings.get("version") or settings.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise self.refuse("version", "'gemm'")

    def weight(self, info: TensorInfo, tensors: Tensors) -> LogicalTensor | None:
        if not info.name.endswith(".qweight"):
            return None
        module = info.name.removesuffix(".qweight")
        name = module + ".weight"
        if info.dtype != "I32":
            raise CheckpointError(
                "a part of a quantized weight has the wrong element type", where=info.name, got=info.dtype, expected="I32"
            )
        inputs, words = unpacked_sizes(info.name, info.shape)
        configured = self.settings.get("group_size", 128)
        group = inputs if configured == -1 else configured
        if type(group) is not int or group < 1:
            raise self.refuse("group_size", "-1 or a number of inputs")
        if inputs % group:
            raise CheckpointError(
                "a quantized weight does not divide into groups", where=name, got=inputs, expected=f"a multiple of {group}"
            )
        scales = part(tensors, name, module + ".scales", (inputs // group, words * _PER_WORD), ("F16", "BF16", "F32"))
        qzeros = None
        if self.settings.get("zero_point", True) or module + ".qzeros" in tensors:
            qzeros = part(tensors, name, module + ".qzeros", (inputs // group, words), ("I32",))
        return AwqTensor(name, (words * _PER_WORD, inputs), "awq", 4, group, qzeros is None, True, scales, info, qzeros)
