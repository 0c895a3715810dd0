"""Lazy weights: how a tensor of the graph is made from tensors of the checkpoint.

A weight is a small expression tree over stored tensors. It is evaluated while the bundle is written, a block of rows at a time, so that
the memory a build needs does not depend on the size of the model. Folds happen in fp32 and are rounded once, at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[np.generic]
# Small enough for the processor's cache: every step of a transform finds its input there.
BLOCK_BYTES = 4 << 20


class TensorSource(Protocol):
    """Stored tensors by name, in the names of the modules."""

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start..stop-1 of a stored tensor (its first axis), as fp32."""


class Weight(ABC):
    """A tensor of the graph; `rows` makes part of it."""

    shape: tuple[int, ...]
    dtype: ir.DataType

    @abstractmethod
    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        """Rows start..stop-1 of the first axis."""

    @abstractmethod
    def stored(self) -> Iterator[str]:
        """Names of the checkpoint tensors that are read for it."""

    @property
    @abstractmethod
    def parameter(self) -> str:
        """The parameter of the model that it is, or is a part or form of; "" for constants and for stacks of several parameters."""

    @property
    def nbytes(self) -> int:
        return -(-prod(self.shape) * self.dtype.bitwidth // 8)

    def elements(self, start: int, stop: int) -> int:
        """How many elements rows start..stop-1 have."""
        return (stop - start) * prod(self.shape[1:])

    def spans(self) -> list[tuple[int, int]]:
        """The first axis cut into ranges whose blocks are of about BLOCK_BYTES in fp32, or of one row where a row has more."""
        count = self.shape[0] if self.shape else 1
        step = max(1, BLOCK_BYTES * count // max(1, prod(self.shape) * 4))
        return [(start, min(count, start + step)) for start in range(0, count, step)]

    def blocks(self, source: TensorSource) -> Iterator[Array]:
        """The whole tensor in order, span after span."""
        for start, stop in self.spans():
            yield self.rows(source, start, stop)

    def evaluate(self, source: TensorSource) -> Array:
        return np.concatenate(list(self.blocks(source)))


class DerivedWeight(Weight):
    """A weight that is made of one other, `of`."""

    of: Weight

    @property
    def parameter(self) -> str:
        return self.of.parameter

    def stored(self) -> Iterator[str]:
        return self.of.stored()


class StackOfWeights(Weight):
    """A weight that is made of several others, `parts`."""

    parts: tuple[Weight, ...]

    @property
    def parameter(self) -> str:
        names = {part.parameter for part in self.parts}
        return names.pop() if len(names) == 1 else ""

    def stored(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.stored()


@dataclass(frozen=True)
class StoredWeight(Weight):
    """A tensor of the checkpoint, converted to `dtype`. `part_of` is the parameter that it is stored for, where that has another name."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    part_of: str = field(default="", compare=False, repr=False)

    @property
    def parameter(self) -> str:
        return self.part_of or self.name

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return source.rows(self.name, start, stop).astype(self.dtype.numpy(), copy=False)

    def stored(self) -> Iterator[str]:
        yield self.name


@dataclass(frozen=True)
class Offset(DerivedWeight):
    """(w + offset) * factor, in fp32: the 1 of a zero-centered norm, and a scale that follows it."""

    of: StoredWeight
    offset: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        _set(self, shape=self.of.shape, dtype=self.of.dtype)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        wide = (source.rows(self.of.name, start, stop) + np.float32(self.offset)) * np.float32(self.factor)
        return wide.astype(self.dtype.numpy(), copy=False)


@dataclass(frozen=True)
class NegativeExp(DerivedWeight):
    """-exp(w) in fp32: the decay scale of a DeltaNet layer from its A_log."""

    of: StoredWeight

    def __post_init__(self) -> None:
        _set(self, shape=self.of.shape, dtype=ir.DataType.FLOAT)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return -np.exp(source.rows(self.of.name, start, stop))


@dataclass(frozen=True)
class Reshaped(DerivedWeight):
    """The same elements in another shape. The first axis keeps its length."""

    of: Weight
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if prod(self.shape) != prod(self.of.shape) or self.shape[0] != self.of.shape[0]:
            raise ValueError(f"cannot view {self.of.shape} as {self.shape}")
        _set(self, dtype=self.of.dtype)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return self.of.rows(source, start, stop).reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class Transposed(DerivedWeight):
    """A transposed matrix. Evaluated whole: the one transform whose memory is the whole tensor."""

    of: Weight

    def __post_init__(self) -> None:
        _set(self, shape=(self.of.shape[1], self.of.shape[0]), dtype=self.of.dtype)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return np.ascontiguousarray(self.of.evaluate(source)[:, start:stop].T)

    def spans(self) -> list[tuple[int, int]]:
        return [(0, self.shape[0])]


@dataclass(frozen=True)
class Column(DerivedWeight):
    """One column of a matrix, as a vector."""

    of: Weight
    index: int

    def __post_init__(self) -> None:
        _set(self, shape=self.of.shape[:1], dtype=self.of.dtype)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return np.ascontiguousarray(self.of.rows(source, start, stop)[:, self.index])


@dataclass(frozen=True)
class HeadRows(DerivedWeight):
    """Rows first..first+take-1 of every group of `group` rows: the query or the gate half of each head of q_proj."""

    of: Weight
    group: int
    first: int
    take: int

    def __post_init__(self) -> None:
        groups = self.of.shape[0] // self.group
        _set(self, shape=(groups * self.take, *self.of.shape[1:]), dtype=self.of.dtype)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        parts, row = [], start
        while row < stop:
            group, inside = divmod(row, self.take)
            count = min(self.take - inside, stop - row)
            begin = group * self.group + self.first + inside
            parts.append(self.of.rows(source, begin, begin + count))
            row += count
        return np.concatenate(parts)


@dataclass(frozen=True)
class FirstRows(DerivedWeight):
    """The first `count` rows. Shares the bytes of the whole where that is written too."""

    of: Weight
    count: int

    def __post_init__(self) -> None:
        _set(self, shape=(self.count, *self.of.shape[1:]), dtype=self.of.dtype)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return self.of.rows(source, start, stop)


@dataclass(frozen=True)
class LastRows(DerivedWeight):
    """The rows from `first` on. Shares the bytes of the whole where that is written too."""

    of: Weight
    first: int

    def __post_init__(self) -> None:
        _set(self, shape=(self.of.shape[0] - self.first, *self.of.shape[1:]), dtype=self.of.dtype)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return self.of.rows(source, self.first + start, self.first + stop)


@dataclass(frozen=True)
class Stacked(StackOfWeights):
    """Several weights of equal row shape on top of each other: one matrix product instead of several."""

    parts: tuple[Weight, ...]

    def __post_init__(self) -> None:
        first = self.parts[0]
        if any(p.shape[1:] != first.shape[1:] or p.dtype != first.dtype for p in self.parts):
            raise ValueError(f"cannot stack {[p.shape for p in self.parts]}")
        _set(self, shape=(sum(p.shape[0] for p in self.parts), *first.shape[1:]), dtype=first.dtype)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        taken, base = [], 0
        for part in self.parts:
            low, high = max(start, base), min(stop, base + part.shape[0])
            if low < high:
                taken.append(part.rows(source, low - base, high - base))
            base += part.shape[0]
        return np.concatenate(taken)


@dataclass(frozen=True)
class StackedMatrices(StackOfWeights):
    """Several weights of one shape along a new first axis: the matrices of all experts as one tensor."""

    parts: tuple[Weight, ...]

    def __post_init__(self) -> None:
        first = self.parts[0]
        if any(p.shape != first.shape or p.dtype != first.dtype for p in self.parts):
            raise ValueError(f"cannot stack {[p.shape for p in self.parts]}")
        _set(self, shape=(len(self.parts), *first.shape), dtype=first.dtype)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return np.stack([part.evaluate(source) for part in self.parts[start:stop]])


@dataclass(frozen=True)
class Interleaved(DerivedWeight):
    """The rows of the two halves of every matrix, interleaved, [E,2I,H]: gate and up of each expert for kernels that read both."""

    of: Weight

    def __post_init__(self) -> None:
        if len(self.of.shape) != 3 or self.of.shape[1] % 2:
            raise ValueError(f"cannot interleave the halves of {self.of.shape}")
        _set(self, shape=self.of.shape, dtype=self.of.dtype)

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        E, rows, columns = stop - start, *self.shape[1:]
        halves = self.of.rows(source, start, stop).reshape(E, 2, rows // 2, columns)
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(E, rows, columns)


@dataclass(frozen=True)
class Constant(Weight):
    """A small array that does not come from the checkpoint."""

    values: tuple[float, ...]
    dtype: ir.DataType

    def __post_init__(self) -> None:
        _set(self, shape=(len(self.values),))

    def rows(self, source: TensorSource, start: int, stop: int) -> Array:
        return np.array(self.values[start:stop]).astype(self.dtype.numpy())

    def stored(self) -> Iterator[str]:
        return iter(())

    @property
    def parameter(self) -> str:
        return ""


def _set(weight: Weight, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(weight, name, value)


class WeightTensor(ir.LazyTensor):
    """A `Weight` as the value of an initializer of onnx_ir."""

    def __init__(self, weight: Weight, name: str) -> None:
        super().__init__(self._unwritten, weight.dtype, ir.Shape(weight.shape), name=name)
        self.weight = weight

    def _unwritten(self) -> ir.TensorProtocol:
        raise RuntimeError(f"weight {self.name} was read before it was written to the bundle")


def weight_of(value: ir.Value | None) -> Weight | None:
    """The lazy weight behind a value, None when it is computed."""
    tensor = value.const_value if value is not None else None
    return tensor.weight if isinstance(tensor, WeightTensor) else None


def retyped(weight: Weight, dtype: ir.DataType) -> Weight | None:
    """The same stored elements in another element type, None for a weight that is computed from them."""
    if isinstance(weight, StoredWeight):
        return replace(weight, dtype=dtype)
    if isinstance(weight, Reshaped | Transposed | HeadRows | FirstRows | LastRows | Interleaved):
        inner = retyped(weight.of, dtype)
        return replace(weight, of=inner) if inner is not None else None
    if isinstance(weight, Stacked | StackedMatrices):
        parts = [retyped(part, dtype) for part in weight.parts]
        return type(weight)(tuple(part for part in parts if part is not None)) if None not in parts else None
    return None


def add_weight(graph: ir.Graph, name: str, weight: Weight) -> ir.Value:
    """A new initializer, or the one of that name."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = WeightTensor(weight, name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(weight.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


__all__: Sequence[str] = (
    "Column",
    "Constant",
    "DerivedWeight",
    "FirstRows",
    "HeadRows",
    "Interleaved",
    "LastRows",
    "NegativeExp",
    "Offset",
    "Reshaped",
    "StackOfWeights",
    "Stacked",
    "StackedMatrices",
    "StoredWeight",
    "TensorSource",
    "Transposed",
    "Weight",
    "WeightTensor",
    "add_weight",
    "retyped",
    "weight_of",
)
