"""Integer weights on a grid per group: w[o, i] = scale[o, g] * (code[o, i] - zero[o, g]), g = i // group.

The formats differ in how codes, scales and zero points are stored. Each is a subclass that reads some rows of them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.logical_tensor import Floats, Grid, GridRows, LogicalTensor, Parts
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class IntegerTensor(LogicalTensor):
    """`method` is the name for people; `in_order` false where the inputs of a group are not neighbors."""

    method: str
    bits: int
    group: int
    symmetric: bool
    in_order: bool
    scales: TensorInfo

    @property
    def grid(self) -> Grid | None:
        return Grid(self.bits, self.group, self.symmetric, self.scales.dtype) if self.in_order else None

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def storage(self) -> str:
        return f"{self.method} int{self.bits} g{self.group}"

    @abstractmethod
    def codes(self, parts: Parts, start: int, stop: int) -> GridRows | None: ...

    def rows(self, parts: Parts, start: int, stop: int) -> Floats:
        codes = self.codes(parts, start, stop)
        if codes is None:
            raise NotImplementedError(f"{self.method} without a grid along its rows must have rows of its own")
        return codes.values()


def unpack(words: npt.NDArray[Any], bits: int) -> Bytes:
    """[..., n] of 32-bit words to [..., n, 32/bits] codes, the lowest bits first."""
    count = 32 // bits
    raw = np.ascontiguousarray(words).view("<u4")
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (raw[..., None] >> shifts).astype(np.uint8).reshape(*raw.shape, count) & np.uint8((1 << bits) - 1)


def zeros_of(weight: IntegerTensor, zeros: Bytes) -> Bytes | None:
    """Zero points that were stored; None for a symmetric weight. Raises CheckpointError where a symmetric weight has zero points that are
    not the middle of the range: the file is then of another variant than its settings, and every value would be wrong."""
    if not weight.symmetric:
        return np.ascontiguousarray(zeros)
    middle = 1 << (weight.bits - 1)
    if (zeros != middle).any():
        other = int(zeros[zeros != middle][0])
        raise CheckpointError(
            "a symmetric weight has zero points that are not in the middle",
            where=weight.name,
            got=other,
            expected=middle,
            fix="Set sym and the format in quantization_config of config.json as the checkpoint was written.",
        )
    return None
