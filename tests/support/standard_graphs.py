"""Small graphs of emitted standard nodes, made runnable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from qwen_export.graphs.weights.expression import weight_of
from qwen_export.plugins.emitter import Emitter

Array = npt.NDArray[Any]
OPSET = 21


class Weights:
    """Stored tensors in memory."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self.tensors = tensors

    def rows(self, name: str, start: int, stop: int) -> Array:
        return np.asarray(self.tensors[name][start:stop], np.float32)


def emitted(
    inputs: Mapping[str, tuple[tuple[int, ...], ir.DataType]],
    build: Callable[[Emitter, dict[str, ir.Value]], Sequence[ir.Value]],
    weights: Mapping[str, Array] | None = None,
) -> onnx.ModelProto:
    """The graph that `build` emits from inputs of the given shapes and types; lazy weights are read from `weights`."""
    values = {name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)) for name, (shape, dtype) in inputs.items()}
    graph = ir.Graph(list(values.values()), [], nodes=[], name="emitted", opset_imports={"": OPSET})
    emit = Emitter(graph, "test")
    outputs = build(emit, values)
    graph.extend(emit.nodes)
    for i, value in enumerate(outputs):
        value.name = f"out{i}"
        graph.outputs.append(value)
    for value in graph.initializers.values():
        weight = weight_of(value)
        if weight is not None:
            value.const_value = ir.tensor(weight.evaluate(Weights(weights or {})), name=value.name)
    return ir.to_proto(ir.Model(graph, ir_version=10))


def session(model: onnx.ModelProto, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
