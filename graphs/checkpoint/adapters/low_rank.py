"""The update of one module: s B A, which is added to its weight, and with DoRA the length that each row then gets.

Facts: PEFT's `LoraLayer.get_delta_weight`, `ParamWrapper`, `DoraLinearVariant`. All arithmetic is fp32.

    matrix            A [r,I], B [O,r]
    embedding         A [r,V], B [H,r], whose update is (B A)^T
    stack of experts  A [E r,I], B [O,r E]: expert e has rows e r to e r + r - 1 of A, and every E-th column of B from e on
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_export.graphs.checkpoint.formats.logical_tensor import Floats, Parts
from qwen_export.graphs.checkpoint.formats.plain_tensor import widened
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo


@dataclass(frozen=True)
class LowRank:
    """`rows` are those of the weight that is updated, or of one expert's."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    rows: int
    experts: int = 1
    embedding: bool = False
    magnitude: TensorInfo | None = None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.a, self.b, *((self.magnitude,) if self.magnitude else ()))

    def delta(self, parts: Parts, expert: int, start: int, stop: int) -> Floats:
        """Rows start..stop-1 of the update of one expert's matrix."""
        rank = self.a.shape[0] // self.experts
        types = (self.b.dtype, self.a.dtype)
        if self.embedding:
            left, right, types = parts.whole(self.a)[:, start:stop].T, parts.whole(self.b).T, types[::-1]
        elif self.experts == 1:
            left, right = parts.stored(self.b, start, stop), parts.whole(self.a)
        else:
            left = parts.whole(self.b)[start:stop, expert :: self.experts]
            right = parts.whole(self.a)[expert * rank : (expert + 1) * rank]
        product = widened(np.ascontiguousarray(left), types[0]) @ widened(np.ascontiguousarray(right), types[1])
        return product * np.float32(self.scale)

    def lengths(self, parts: Parts, start: int, stop: int) -> Floats | None:
        """Of DoRA: the lengths of rows start..stop-1, [rows, 1]."""
        if self.magnitude is None:
            return None
        return widened(parts.whole(self.magnitude), self.magnitude.dtype).reshape(-1, 1)[start:stop]


@dataclass(frozen=True)
class Place:
    """Where an update meets a weight. `expert`: which of the update's matrices, None for the one of the same number as the weight's;
    `shift`: the update's row at row 0 of the weight's matrix; `only`: of a weight of all experts, the one that is updated."""

    update: LowRank
    expert: int | None = 0
    shift: int = 0
    only: int | None = None

    def applied(self, parts: Parts, base: Floats, values: Floats, number: int, start: int) -> Floats:
        """`values`, rows of the weight's matrix `number` from row `start` on, with this update. `base` are the rows without any."""
        if self.only not in (None, number):
            return values
        first, last = max(0, start + self.shift), min(self.update.rows, start + len(values) + self.shift)
        if first >= last:
            return values
        rows = slice(first - self.shift - start, last - self.shift - start)
        delta = self.update.delta(parts, number if self.expert is None else self.expert, first, last)
        changed = values[rows] + delta
        lengths = self.update.lengths(parts, first, last)
        if lengths is not None:  # the norm is that of the weight without other adapters
            changed *= lengths / np.linalg.norm(base[rows] + delta, axis=1, keepdims=True)
        result = values.copy()
        result[rows] = changed
        return result
