"""Emitting nodes: the emitter that all lowerings use, with short names for the operators that they need most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.passes.pass_context import new_node
from qwen_export.graphs.passes.recognize_linear import LINEAR
from qwen_export.graphs.weights.expression import Constant, Weight, add_weight

Other = TypeVar("Other", bound="Emitter")

Kept = TypeVar("Kept")

Shared = dict[str, Any]
"""What the first layer makes and the others read, by name: values, or groups of values. One per graph; its emitters share it."""


def static_shape(x: ir.Value) -> tuple[int, ...]:
    """The shape of a value of which every size is known."""
    if x.shape is None:
        raise TypeError(f"{x.name} has no shape")
    return tuple(size for size in x.shape if isinstance(size, int))


class Emitter:
    """Collects the nodes that replace one op, named `prefix`.op.number. Constants are shared by name through the graph; values that are
    the same in every layer are shared through `shared`."""

    def __init__(self, graph: ir.Graph, prefix: str, shared: Shared | None = None) -> None:
        self.graph, self.prefix = graph, prefix
        self.nodes: list[ir.Node] = []
        self._shared = {} if shared is None else shared

    def __call__(
        self, domain: str, op: str, inputs: Sequence[ir.Value | None], outputs: int = 1, **attributes: object
    ) -> tuple[ir.Value, ...]:
        """Emit a node; returns its outputs. `dtype` or `like` type them."""
        node = new_node(domain, op, inputs, outputs, **attributes)  # type: ignore[arg-type]
        node.name = f"{self.prefix}.{op}.{len(self.nodes)}"
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}.{i}"
        self.nodes.append(node)
        return tuple(node.outputs)

    def continued_as(self, kind: type[Other]) -> Other:
        """An emitter of another kind that adds to the same nodes."""
        other = kind(self.graph, self.prefix, self._shared)
        other.nodes = self.nodes
        return other

    def shared(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What the first layer makes and the others read. A name stands for one thing."""
        if name not in self._shared:
            self._shared[name] = make()
        kept: Kept = self._shared[name]
        return kept

    def linear(self, x: ir.Value, weight: Weight, name: str) -> ir.Value:
        """x times a weight [N,K], as qwen::linear, to be lowered with the others."""
        return self(DOMAIN, LINEAR, [x, add_weight(self.graph, name, weight)], like=x)[0]

    # ---- constants ----

    def array(self, name: str, values: npt.NDArray[np.generic]) -> ir.Value:
        """A constant that is stored in the graph file: masks, scalars, index vectors."""
        if name not in self.graph.initializers:
            tensor = ir.tensor(values, name=name)
            value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.array("ints_" + "_".join(str(v).replace("-", "m") for v in values), np.array(values, np.int64))

    def integer(self, value: int) -> ir.Value:
        """An int64 scalar."""
        return self.array(f"integer_{value}".replace("-", "m"), np.array(value, np.int64))

    def scalar(self, value: float) -> ir.Value:
        """An fp32 scalar."""
        return self.array(f"scalar_{value:.9g}", np.array(value, np.float32))

    def positions(self, count: int) -> ir.Value:
        """i32 [0, 1, ..., count-1]."""
        return self.array(f"positions_{count}", np.arange(count, dtype=np.int32))

    def filled(self, name: str, value: float, size: int, dtype: ir.DataType) -> ir.Value:
        """A vector of equal values, stored with the weights."""
        return add_weight(self.graph, name, Constant((value,) * size, dtype))

    # ---- operators ----

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

    def rms_norm(self, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """The same times a weight f32[D] of the last axis."""
        return self.mul(self.mean_square_scale(x, eps), weight)

    def unit_scale(self, x: ir.Value, D: int, scale: ir.Value, eps: float) -> ir.Value:
        """scale * x / sqrt(sum(x^2) + eps) over the last axis, which has D elements, in fp32."""
        (square,) = self("", "ReduceSum", [self.mul(x, x), self.ints(-1)], like=x, keepdims=1)
        (length,) = self("", "Sqrt", [self.add(square, self.scalar(eps))], like=x)
        return self.mul(x, self("", "Div", [scale, length], like=x)[0])
