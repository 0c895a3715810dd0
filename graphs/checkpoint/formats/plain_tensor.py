"""A weight stored as it is: BF16, F16 or F32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export.element_types import BY_SAFETENSORS
from qwen_export.graphs.checkpoint.formats.logical_tensor import PLAIN_TYPES, Floats, LogicalTensor, Parts
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo


@dataclass(frozen=True)
class PlainTensor(LogicalTensor):
    info: TensorInfo

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def storage(self) -> str:
        return BY_SAFETENSORS[self.info.dtype].short if self.info.dtype in PLAIN_TYPES else self.info.dtype

    @property
    def quantized(self) -> bool:
        return False

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.info,)

    def rows(self, parts: Parts, start: int, stop: int) -> Floats:
        return widened(parts.stored(self.info, start, stop), self.info.dtype)


def widened(raw: npt.NDArray[Any], dtype: str) -> Floats:
    """Values of BF16, F16 or F32, by the name of safetensors, as fp32."""
    if dtype == "BF16":  # faster than a conversion of values: BF16 is the upper half of F32
        return np.left_shift(raw.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
    return raw.astype(np.float32, copy=False)


def plain(info: TensorInfo) -> PlainTensor:
    return PlainTensor(info.name, info.shape, info)
