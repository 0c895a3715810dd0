"""A weight with adapters merged into it, row by row as it is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_export.graphs.checkpoint.adapters.low_rank import Place
from qwen_export.graphs.checkpoint.formats.logical_tensor import Floats, LogicalTensor, Parts
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo


@dataclass(frozen=True)
class MergedTensor(LogicalTensor):
    """`places` are applied in order. A quantized base is dequantized: its grid holds no sum."""

    base: LogicalTensor
    places: tuple[Place, ...]

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def storage(self) -> str:
        return f"{self.base.storage} + LoRA"

    @property
    def recipe(self) -> str:
        updates = [
            f"{place.update.scale!r} {place.update.experts} {place.update.embedding} {place.expert} {place.shift} {place.only}"
            for place in self.places
        ]
        return " + ".join([self.base.recipe, *updates])

    @property
    def quantized(self) -> bool:
        return self.base.quantized

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (*self.base.parts, *(part for place in self.places for part in place.update.parts))

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    def rows(self, parts: Parts, start: int, stop: int) -> Floats:
        values = self.base.rows(parts, start, stop)
        if len(self.shape) == 2:
            return self._merged(parts, values, 0, start)
        return np.stack([self._merged(parts, matrix, start + i, 0) for i, matrix in enumerate(values)])

    def _merged(self, parts: Parts, base: Floats, number: int, start: int) -> Floats:
        values = base
        for place in self.places:
            values = place.applied(parts, base, values, number, start)
        return values
