"""Emitting standard nodes: the emitter of the lowerings with what decompositions use all the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwen_export.plugins import rewrite as common

Other = TypeVar("Other", bound="Emitter")


def static_shape(x: ir.Value) -> tuple[int, ...]:
    """The shape of a value of which every size is known."""
    if x.shape is None:
        raise TypeError(f"{x.name} has no shape")
    return tuple(size for size in x.shape if isinstance(size, int))


class Emitter(common.Emitter):
    """Collects standard nodes. Constants are shared by name through the graph; so are values that are the same in every layer, through
    `once`, which all emitters of a graph are given."""

    def __init__(self, graph: ir.Graph, prefix: str, once: dict[str, ir.Value] | None = None) -> None:
        super().__init__(graph, prefix)
        self._once = {} if once is None else once

    def going_on(self, kind: type[Other]) -> Other:
        """An emitter of another kind that goes on where this one is."""
        other = kind(self.graph, self.prefix, self._once)
        other.nodes = self.nodes
        return other

    def shared(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        """A value that the first layer computes and the others read."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]

    def array(self, name: str, values: npt.NDArray[np.generic]) -> ir.Value:
        """A constant that lies in the graph itself: masks, scalars, index vectors."""
        if name not in self.graph.initializers:
            tensor = ir.tensor(values, name=name)
            value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def scalar(self, value: float) -> ir.Value:
        """An fp32 scalar."""
        return self.array(f"scalar_{value:.9g}", np.array(value, np.float32))

    def positions(self, count: int) -> ir.Value:
        """i32 [0, 1, ..., count-1]."""
        return self.array(f"positions_{count}", np.arange(count, dtype=np.int32))

    def mul(self, a: ir.Value | None, b: ir.Value | None) -> ir.Value:
        return self("", "Mul", [a, b], like=a)[0]

    def add(self, a: ir.Value | None, b: ir.Value | None) -> ir.Value:
        return self("", "Add", [a, b], like=a)[0]

    def sub(self, a: ir.Value | None, b: ir.Value | None) -> ir.Value:
        return self("", "Sub", [a, b], like=a)[0]

    def matmul(self, a: ir.Value | None, b: ir.Value | None) -> ir.Value:
        return self("", "MatMul", [a, b], like=a)[0]

    def exp(self, x: ir.Value) -> ir.Value:
        return self("", "Exp", [x], like=x)[0]

    def sigmoid(self, x: ir.Value) -> ir.Value:
        return self("", "Sigmoid", [x], like=x)[0]

    def reshape(self, x: ir.Value | None, *shape: int) -> ir.Value:
        (y,) = self("", "Reshape", [x, self.ints(*shape)], like=x)
        if min(shape) > 0:
            y.shape = ir.Shape(shape)
        return y

    def transpose(self, x: ir.Value, *perm: int) -> ir.Value:
        return self("", "Transpose", [x], like=x, perm=perm)[0]

    def concat(self, values: Sequence[ir.Value | None], axis: int) -> ir.Value:
        return self("", "Concat", values, like=values[0], axis=axis)[0]

    def split(self, x: ir.Value, sizes: Sequence[int], axis: int) -> tuple[ir.Value, ...]:
        return self("", "Split", [x, self.ints(*sizes)], len(sizes), like=x, axis=axis)

    def rows(self, x: ir.Value, start: int, stop: int, axis: int) -> ir.Value:
        """x[start:stop] along one axis."""
        return self("", "Slice", [x, self.ints(start), self.ints(stop), self.ints(axis)], like=x)[0]

    def gather(self, x: ir.Value | None, indices: ir.Value, axis: int) -> ir.Value:
        return self("", "Gather", [x, indices], like=x, axis=axis)[0]

    def cast(self, x: ir.Value | None, dtype: ir.DataType) -> ir.Value:
        """x itself where it has that dtype."""
        if x is None:
            raise TypeError("nothing to cast")
        return x if x.dtype == dtype else self("", "Cast", [x], dtype=dtype, to=int(dtype))[0]

    def wide(self, x: ir.Value | None) -> ir.Value:
        return self.cast(x, ir.DataType.FLOAT)

    def mean_square_scale(self, x: ir.Value, eps: float) -> ir.Value:
        """x / sqrt(mean(x^2) + eps) over the last axis, in fp32."""
        (mean,) = self("", "ReduceMean", [self.mul(x, x), self.ints(-1)], like=x, keepdims=1)
        (root,) = self("", "Sqrt", [self.add(mean, self.scalar(eps))], like=x)
        return self("", "Div", [x, root], like=x)[0]
