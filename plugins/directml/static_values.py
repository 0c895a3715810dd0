"""Constants and sizes of a graph with static shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qwen_export.errors import REPORT, CaptureError


def integers(graph: ir.Graph, values: Sequence[int]) -> ir.Value:
    """An int64 vector as an initializer, under the name that emitters give it."""
    name = "ints_" + "_".join(str(value).replace("-", "m") for value in values)
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(values, np.int64), name=name)
        graph.register_initializer(ir.Value(name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(tensor.dtype), const_value=tensor))
    return graph.initializers[name]


def positions(graph: ir.Graph, start: int, stop: int) -> ir.Value:
    """int64 [start, ..., stop-1] as an initializer."""
    name = f"positions_{start}_to_{stop}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.arange(start, stop, dtype=np.int64), name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape([stop - start]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]


def size_along(model: ir.Model, value: ir.Value | None, axis: int) -> int:
    """The size of a value along an axis. Raises CaptureError where it is not known."""
    if value is not None and value.shape is None:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    size = value.shape[axis] if value is not None and value.shape is not None else None
    if not isinstance(size, int):
        raise CaptureError("a size that the graph depends on is unknown", where=str(value and value.name), got=size, fix=REPORT)
    return size
