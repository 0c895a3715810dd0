"""Sizes of values in a graph with static shapes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qwen_export.errors import REPORT, CaptureError


def size_along(model: ir.Model, value: ir.Value | None, axis: int) -> int:
    """The size of a value along an axis. Raises CaptureError where it is not known."""
    if value is not None and value.shape is None:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    size = value.shape[axis] if value is not None and value.shape is not None else None
    if not isinstance(size, int):
        raise CaptureError("a size that the graph depends on is unknown", where=str(value and value.name), got=size, fix=REPORT)
    return size
