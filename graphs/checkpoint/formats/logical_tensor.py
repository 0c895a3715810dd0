"""A weight as the model uses it, whatever tensors of the file it is stored in.

A quantized weight is several stored tensors: codes, scales, perhaps zero points. A `LogicalTensor` has the name and shape of the plain
weight, knows its parts and makes plain rows of them. Everything but `rows` and `codes` is known from the headers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qwen_export.element_types import BY_SAFETENSORS, PLAIN
from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo

Floats = npt.NDArray[np.float32]
Tensors = Mapping[str, TensorInfo]

PLAIN_TYPES = tuple(kind.safetensors for kind in PLAIN)
FLOAT_SCALES = PLAIN_TYPES


class Parts(Protocol):
    """Access to stored tensors, in the numpy type of their elements."""

    def stored(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows start..stop-1 of the first axis. The caller may write to them."""

    def whole(self, info: TensorInfo) -> npt.NDArray[Any]:
        """The whole tensor, kept for the next call. Not to be written to."""


@dataclass(frozen=True)
class Grid:
    """The grid of an integer-quantized weight, known from the headers: what a kernel must have to keep it. `group` values along a row share
    a scale; `symmetric` weights have no zero points; `scales` is the safetensors type of the scales."""

    bits: int
    group: int
    symmetric: bool
    scales: str


@dataclass(frozen=True)
class GridRows:
    """Rows of an integer-quantized weight on its own grid: weight[r, i] = scales[r, i // group] * (codes[r, i] - zeros[r, i // group]).

    codes: u8[R, I], each below 2^bits; scales: f32[R, I // group]; zeros: u8[R, I // group], None for a symmetric weight, whose zero points
    are all 2^(bits-1)."""

    codes: npt.NDArray[np.uint8]
    scales: Floats
    zeros: npt.NDArray[np.uint8] | None
    group: int
    bits: int

    def values(self) -> Floats:
        """The weights, as fp32. Exact for scales of 16 bits."""
        rows, columns = self.codes.shape
        grouped = self.codes.reshape(rows, -1, self.group).astype(np.float32)
        grouped -= np.float32(1 << (self.bits - 1)) if self.zeros is None else self.zeros[:, :, None].astype(np.float32)
        grouped *= self.scales[:, :, None]
        return grouped.reshape(rows, columns)


@dataclass(frozen=True)
class Fp8Rows:
    """Rows of a weight that is stored as FP8: weight[r, i] = scales[r, i // columns] * E4M3 number of codes[r, i].

    codes: u8[R, I] or u8[E, R, I]; scales: f32[R, I / columns, rounded up], likewise."""

    codes: npt.NDArray[np.uint8]
    scales: Floats
    columns: int


@dataclass(frozen=True)
class LogicalTensor(ABC):
    """A weight under its plain name."""

    name: str
    shape: tuple[int, ...]

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The safetensors type that holds its values exactly or as the format defines them: BF16, F16 or F32 if it can be read."""

    @property
    @abstractmethod
    def storage(self) -> str:
        """How it is stored, for people: `bf16`, `fp8 128x128`, `gptq int4 g128`."""

    @property
    def recipe(self) -> str:
        """How its values are made of its parts, as a text: two weights with equal parts and recipes are equal."""
        return self.storage

    @property
    def quantized(self) -> bool:
        """Whether it is not stored as floating-point values of its own."""
        return True

    @property
    @abstractmethod
    def parts(self) -> tuple[TensorInfo, ...]:
        """The stored tensors it is made of."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    @abstractmethod
    def rows(self, parts: Parts, start: int, stop: int) -> Floats:
        """Rows start..stop-1 of the first axis. Raises CheckpointError for scales that no model can use."""

    @property
    def grid(self) -> Grid | None:
        """The integer grid along its rows that the checkpoint stores; None for a weight that has none."""
        return None

    def codes(self, parts: Parts, start: int, stop: int) -> GridRows | None:
        """The same rows on that grid."""
        return None

    @property
    def fp8_block(self) -> tuple[int, int] | None:
        """Rows and columns of a matrix that share a scale of its E4M3 codes; None for a weight that has no such codes."""
        return None

    def fp8_rows(self, parts: Parts, start: int, stop: int) -> Fp8Rows | None:
        """The same rows as codes with their scales."""
        return None


def numpy_type(info: TensorInfo) -> np.dtype[Any]:
    return BY_SAFETENSORS[info.dtype].dtype()


def scales_of(tensors: Tensors, weight: str, name: str) -> TensorInfo:
    """A part that must be stored, in any shape."""
    info = tensors.get(name)
    if info is None:
        raise CheckpointError("a part of a quantized weight is missing", where=weight, expected=name, fix="Is a shard missing?")
    return info


def part(tensors: Tensors, weight: str, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> TensorInfo:
    """A part that the weight needs, in its shape and one of its types."""
    info = scales_of(tensors, weight, name)
    if info.shape != shape:
        raise CheckpointError(
            "a part of a quantized weight has the wrong shape",
            where=name,
            got=info.shape,
            expected=shape,
            fix="Is quantization_config in config.json from another checkpoint?",
        )
    if info.dtype not in dtypes:
        raise CheckpointError(
            "a part of a quantized weight has the wrong element type",
            where=name,
            got=info.dtype,
            expected=" or ".join(dtypes),
            fix="Is quantization_config in config.json from another checkpoint?",
        )
    return info


def checked_scales(info: TensorInfo, raw: npt.NDArray[Any], *, divides: bool = False) -> Floats:
    """Scales as fp32, all finite. A scale of zero is the scale of a block of zeros, and is an error where the scale `divides`."""
    if info.dtype == "U8":  # powers of two, as tools of microscaling formats store them
        raw = raw.view(BY_SAFETENSORS["F8_E8M0"].dtype())
    scales = raw.astype(np.float32)
    wrong = "not finite" if not np.isfinite(scales).all() else "zero" if divides and not scales.all() else ""
    if wrong:
        raise CheckpointError(
            f"a quantized weight has scales that are {wrong}", where=info.name, fix="The checkpoint is damaged: copy or download it again."
        )
    return scales
