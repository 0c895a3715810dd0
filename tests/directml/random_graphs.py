"""Random small graphs of the operators that our `directml` graphs are made of, with values that are read more than once.

`random_graph(seed)` is a model with static shapes; its outputs are all values that nothing reads and a few that something does."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZES = (1, 2, 3, 4, 6, 8)
_LIMIT = 32  # elements along an axis

Shape = tuple[int, ...]


class Graph:
    """A graph that grows by one random node at a time. `floats` are the values so far, with their shapes, all fp32 or all fp16."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.element = TensorProto.FLOAT if self.rng.random() < 0.7 else TensorProto.FLOAT16
        self.dtype = helper.tensor_dtype_to_np_dtype(self.element)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.floats: dict[str, Shape] = {}
        for _ in range(int(self.rng.integers(2, 4))):
            self._input(tuple(self.sizes(int(self.rng.integers(2, 4)))))

    # ---- choices ----

    def sizes(self, count: int) -> list[int]:
        return [int(size) for size in self.rng.choice(SIZES[1:], count)]

    def axis(self, x: str) -> int:
        return int(self.rng.integers(len(self.floats[x])))

    def any(self, suits: Callable[[Shape], bool] = lambda shape: True) -> str | None:
        """A value, the last ones more often than the first."""
        names = [name for name, shape in self.floats.items() if suits(shape)]
        if not names:
            return None
        weights = np.arange(1, len(names) + 1, dtype=float)
        return str(self.rng.choice(names, p=weights / weights.sum()))

    # ---- parts ----

    def _input(self, shape: Shape) -> str:
        name = f"in{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, self.element, shape))
        self.floats[name] = shape
        return name

    def constant(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def random(self, *shape: int) -> str:
        return self.constant((self.rng.standard_normal(shape) / math.sqrt(shape[0] if shape else 1)).astype(self.dtype))

    def emit(self, op: str, inputs: list[str], *shapes: Shape, keep: bool = True, **attributes: object) -> list[str]:
        domain = str(attributes.pop("domain", ""))
        names = [f"v{len(self.nodes)}_{i}" for i in range(len(shapes))]
        self.nodes.append(helper.make_node(op, inputs, names, domain=domain, **attributes))
        if keep:
            self.floats.update(zip(names, shapes, strict=True))
        return names

    # ---- nodes ----

    def elementwise(self, x: str) -> None:
        op = str(self.rng.choice(["Sigmoid", "Tanh", "Softplus", "Neg", "Exp", "Sqrt", "Identity"]))
        shape = self.floats[x]
        if op in ("Exp", "Sqrt"):
            [x] = self.emit("Sigmoid" if op == "Sqrt" else "Tanh", [x], shape, keep=bool(self.rng.random() < 0.3))
        self.emit(op, [x], shape)

    def silu(self, x: str) -> None:
        shape = self.floats[x]
        [gate] = self.emit("Sigmoid", [x], shape, keep=False)
        self.emit("Mul", [x, gate], shape)

    def arithmetic(self, x: str) -> None:
        """With a value of the same shape, a vector of the last axis or a scalar."""
        shape, op = self.floats[x], str(self.rng.choice(["Add", "Sub", "Mul", "Div"]))
        kind = int(self.rng.integers(3))
        other = self.any(lambda s: s == shape) or x if kind == 0 else self.random(shape[-1]) if kind == 1 else self.random()
        if op == "Div":
            other_shape = shape if kind == 0 else (shape[-1],) if kind == 1 else ()
            [gate] = self.emit("Sigmoid", [other], other_shape, keep=False)
            [other] = self.emit("Add", [gate, self.constant(np.array(0.5, self.dtype))], other_shape, keep=False)
        self.emit(op, [x, other], shape)

    def product(self, x: str) -> None:
        shape, N = self.floats[x], int(self.rng.choice(SIZES))
        if len(shape) == 2 and self.rng.random() < 0.5:
            self.emit("Gemm", [x, self.random(N, shape[-1])], (shape[0], N), transB=1)
        else:
            self.emit("MatMul", [x, self.random(shape[-1], N)], (*shape[:-1], N))

    def product_of_values(self, x: str) -> None:
        shape = self.floats[x]
        perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        turned = (*shape[:-2], shape[-1], shape[-2])
        [y] = self.emit("Transpose", [x], turned, keep=bool(self.rng.random() < 0.5), perm=perm)
        self.emit("MatMul", [x, y], (*shape[:-1], shape[-2]))

    def concat(self, x: str) -> None:
        shape, axis = self.floats[x], self.axis(x)
        rest = (*shape[:axis], *shape[axis + 1 :])
        parts = [x]
        for _ in range(int(self.rng.integers(1, 3))):
            other = self.any(lambda s: len(s) == len(shape) and (*s[:axis], *s[axis + 1 :]) == rest)
            if other is not None and self.rng.random() < 0.7:
                parts.append(other)
            elif self.rng.random() < 0.5:
                parts.append(self._input((*shape[:axis], int(self.rng.choice(SIZES)), *shape[axis + 1 :])))
        if self.rng.random() < 0.5:
            parts.reverse()
        size = sum(self.floats[part][axis] for part in parts)
        if len(parts) > 1 and size <= _LIMIT:
            [c] = self.emit("Concat", parts, (*shape[:axis], size, *shape[axis + 1 :]), axis=axis)
            if self.rng.random() < 0.6:
                self.rng.choice([self.elementwise, self.arithmetic, self.silu])(c)

    def split(self, x: str) -> None:
        shape, axis = self.floats[x], self.axis(x)
        if shape[axis] > 1:
            first = int(self.rng.integers(1, shape[axis]))
            sizes = (first, shape[axis] - first)
            self.emit("Split", [x, self.ints(*sizes)], *((*shape[:axis], size, *shape[axis + 1 :]) for size in sizes), axis=axis)

    def slice(self, x: str) -> None:
        shape, axis = self.floats[x], self.axis(x)
        start = int(self.rng.integers(shape[axis]))
        stop = int(self.rng.integers(start + 1, shape[axis] + 1))
        shape = (*shape[:axis], stop - start, *shape[axis + 1 :])
        self.emit("Slice", [x, self.ints(start), self.ints(stop), self.ints(axis)], shape)

    def gather(self, x: str) -> None:
        """By constants, or by positions that an input moves, as the history of a convolution is."""
        shape, axis, count = self.floats[x], self.axis(x), int(self.rng.choice(SIZES))
        rows = self.rng.integers(0, shape[axis], count).astype(np.int32)
        index = self.constant(rows)
        if self.rng.random() < 0.4:
            index = self.constant(np.minimum(rows, shape[axis] - 1).astype(np.int32))
            [index] = self.emit("Add", [index, self.constant(np.zeros(1, np.int32))], (count,), keep=False)
        self.emit("Gather", [x, index], (*shape[:axis], count, *shape[axis + 1 :]), axis=axis)

    def reshape(self, x: str) -> None:
        shape, kind = self.floats[x], int(self.rng.integers(3))
        sizes = (math.prod(shape),) if kind == 0 else (1, *shape) if kind == 1 else (math.prod(shape[:-1]), shape[-1])
        if len(sizes) <= 4 and len(sizes) > 1:
            self.emit("Reshape", [x, self.ints(*sizes)], sizes)

    def transpose(self, x: str) -> None:
        shape = self.floats[x]
        perm = [int(axis) for axis in self.rng.permutation(len(shape))]
        self.emit("Transpose", [x], tuple(shape[axis] for axis in perm), perm=perm)

    def expand(self, x: str) -> None:
        shape, times = self.floats[x], int(self.rng.choice(SIZES[1:]))
        if shape[0] == 1:
            self.emit("Expand", [x, self.ints(times, *shape[1:])], (times, *shape[1:]))

    def reduce(self, x: str) -> None:
        op = str(self.rng.choice(["ReduceSum", "ReduceMean"]))
        shape = self.floats[x]
        self.emit(op, [x, self.ints(-1)], (*shape[:-1], 1), keepdims=1)

    def norm(self, x: str) -> None:
        """As of a head: x / sqrt(mean(x^2) + eps)."""
        shape = self.floats[x]
        [square] = self.emit("Mul", [x, x], shape, keep=False)
        [mean] = self.emit("ReduceMean", [square, self.ints(-1)], (*shape[:-1], 1), keep=False, keepdims=1)
        [moved] = self.emit("Add", [mean, self.constant(np.array(1e-3, self.dtype))], (*shape[:-1], 1), keep=False)
        [root] = self.emit("Sqrt", [moved], (*shape[:-1], 1), keep=False)
        self.emit("Div", [x, root], shape)

    def fused_norm(self, x: str) -> None:
        shape = self.floats[x]
        self.emit("SimplifiedLayerNormalization", [x, self.random(shape[-1])], shape, axis=-1, epsilon=1e-3, stash_type=1)

    def softmax(self, x: str) -> None:
        self.emit("Softmax", [x], self.floats[x], axis=-1)

    def masked(self, x: str) -> None:
        shape = self.floats[x]
        [inside] = self.emit(
            "Less",
            [self.constant(np.arange(shape[-1], dtype=np.int32)), self.constant(np.array([2], np.int32))],
            (shape[-1],),
            keep=False,
        )
        if self.rng.random() < 0.5:
            self.emit("Where", [inside, x, self.constant(np.array(-2, self.dtype))], shape)
        else:
            [mask] = self.emit("Cast", [inside], (shape[-1],), keep=False, to=self.element)
            self.emit("Mul", [x, mask], shape)

    def through_other_precision(self, x: str) -> None:
        shape = self.floats[x]
        other = TensorProto.FLOAT16 if self.element == TensorProto.FLOAT else TensorProto.FLOAT
        [y] = self.emit("Cast", [x], shape, keep=False, to=other)
        if self.rng.random() < 0.5:
            [y] = self.emit("Sigmoid", [y], shape, keep=False)
        self.emit("Cast", [y], shape, to=self.element)


_STEPS = (
    *(Graph.concat,) * 4,
    *(Graph.elementwise,) * 3,
    *(Graph.arithmetic,) * 3,
    *(Graph.product,) * 2,
    *(Graph.split, Graph.slice, Graph.gather, Graph.reshape, Graph.transpose, Graph.silu),
    *(Graph.product_of_values, Graph.expand, Graph.reduce, Graph.norm, Graph.fused_norm, Graph.softmax, Graph.masked),
    Graph.through_other_precision,
)


def random_graph(seed: int, steps: int = 9) -> onnx.ModelProto:
    """Opset 20, as fp16 and fp32 bundles have."""
    graph = Graph(seed)
    for _ in range(steps):
        step = _STEPS[int(graph.rng.integers(len(_STEPS)))]
        x = graph.any(lambda shape: len(shape) > 1)
        if x is not None:
            step(graph, x)
    read = {name for node in graph.nodes for name in node.input}
    given = {value.name for value in graph.inputs}
    outputs = [name for name in graph.floats if name not in given and (name not in read or graph.rng.random() < 0.25)]
    return model_of(graph, outputs)


def model_of(graph: Graph, outputs: list[str]) -> onnx.ModelProto:
    made = [helper.make_tensor_value_info(name, graph.element, graph.floats[name]) for name in outputs]
    inner = [helper.make_tensor_value_info(name, graph.element, shape) for name, shape in graph.floats.items() if name not in outputs]
    given = {value.name for value in graph.inputs}
    proto = helper.make_graph(
        graph.nodes, "random", graph.inputs, made, graph.weights, value_info=[value for value in inner if value.name not in given]
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
