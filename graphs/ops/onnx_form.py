"""The ONNX form of the ops: schema and translation, generated from each op's declaration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import onnx.defs
from onnxscript import values

from qwen_export.graphs.ops.op_schema import DOMAIN, OPSET_VERSION, Op
from qwen_export.graphs.ops.op_table import OPS

_TYPES = [f"tensor({name})" for name in ("float", "float16", "bfloat16", "int64", "int8", "float8e4m3fn")]
_ATTRIBUTES = {"int": (int, onnx.defs.OpSchema.AttrType.INT), "float": (float, onnx.defs.OpSchema.AttrType.FLOAT)}


def onnx_schema(op: Op) -> onnx.defs.OpSchema:
    """One type variable per tensor: the op, not the schema, checks which dtypes fit together."""
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    inputs = [parameter(name, f"T_{name}") for name in op.inputs]
    outputs = [parameter(name, f"T_{name}") for name in op.outputs]
    return onnx.defs.OpSchema(
        op.name,
        DOMAIN,
        OPSET_VERSION,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[(f"T_{name}", _TYPES, "") for name in op.inputs + op.outputs],
        attributes=[attribute(name, _ATTRIBUTES[kind][1], "") for name, kind in op.attributes.items()],
    )


def _translation(op: Op) -> Callable[..., Any]:
    """A function that torch.onnx calls with the op's arguments to record one node."""
    node = values.Op(values.Opset(DOMAIN, OPSET_VERSION), op.name, onnx_schema(op))

    def translate(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        return node(*(bound[name] for name in op.inputs), **{name: bound[name] for name in op.attributes})

    # torch.onnx takes parameters for inputs or attributes by their annotations.
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in op.inputs]
    scalars = {name: _ATTRIBUTES[kind][0] for name, kind in op.attributes.items()}
    parameters += [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in scalars.items()]
    signature = inspect.Signature(parameters)
    translate.__signature__ = signature  # type: ignore[attr-defined]
    translate.__annotations__ = dict(scalars)
    return translate


def translation_table() -> dict[Any, Callable[..., Any]]:
    """For torch.onnx.export's `custom_translation_table`."""
    return {op.overload: _translation(op) for op in OPS.values()}
