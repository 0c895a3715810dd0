"""Our plugins for the full TensorRT, as quick-deployable plugins: their PTX and how it is launched become part of the engine.

`tensorrt.plugin` reads names and types of the arguments off the functions, so these are made with the signatures that it expects. A kernel
gets the pointers of the inputs, the 32-bit numbers and the pointers of the outputs, in this order.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from qwen_export.runtimes.backends.tensorrt.delta_net_plugin import (
    ACTIVATION,
    COUNT,
    FLOAT,
    NAMESPACE,
    RESULTS,
    TENSORS,
    THREADS,
    StepFields,
    unpack_ptx,
)
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import Library

_ACTIVATIONS = ("FP32", "FP16", "BF16")
_WRITTEN = {FLOAT: "FP32", COUNT: "INT32"}
_ATTRIBUTES = {field.name: str if field.type == "str" else int for field in fields(StepFields)}


def register(library: Library) -> None:
    """Make the plugins known to a full TensorRT that builds; a runtime needs none of this."""
    plugin = importlib.import_module(f"{library.api.__name__}.plugin")
    for kind in TENSORS:
        if kind not in _registered:
            _register(plugin, kind)
            _registered.add(kind)


_registered: set[str] = set()


def _register(plugin: Any, kind: str) -> None:
    tensors = TENSORS[kind]
    arguments = dict.fromkeys(tensors, plugin.TensorDesc) | _ATTRIBUTES
    described = tuple[plugin.TensorDesc, plugin.TensorDesc, plugin.TensorDesc]  # y, history', state'
    outputs = {"outputs": described}

    def describe(*given: Any) -> Any:
        return results(plugin, dict(zip(tensors, given, strict=False)), StepFields(*given[len(tensors) :]))

    def tune(*given: Any) -> list[Any]:
        return [plugin.AutoTuneCombination(types, "LINEAR") for types in combinations(kind)]

    def kernel(*given: Any) -> Any:
        return launch(plugin, StepFields(*given[len(tensors) : -2]))

    launched = tuple[str, bytes, plugin.KernelLaunchParams, plugin.SymIntExprs]
    name = f"{NAMESPACE}::{kind}"
    plugin.register(name, lazy_register=False)(_with_signature(describe, arguments, described))
    plugin.autotune(name)(_with_signature(tune, arguments | outputs, list[plugin.AutoTuneCombination]))
    plugin.aot_impl(name)(_with_signature(kernel, arguments | outputs | {"tactic": int}, launched))


def results(plugin: Any, tensors: dict[str, Any], given: StepFields) -> Any:
    """Descriptions of y, history' and state'."""
    packed = tensors["packed"]
    y = packed.like()
    y.shape_expr = plugin.ShapeExprs.from_tuple((packed.shape_expr[0], packed.shape_expr[1], given.width))
    return y, tensors["history"].like(), tensors["state"].like()


def combinations(kind: str) -> list[str]:
    """Element types of inputs and outputs, as TensorRT writes them, for each type of activations."""
    types = [*TENSORS[kind].values(), *RESULTS.values()]
    return [", ".join({**_WRITTEN, ACTIVATION: activation}[name] for name in types) for activation in _ACTIVATIONS]


def launch(plugin: Any, given: StepFields) -> tuple[str, bytes, Any, Any]:
    """Name and PTX of the kernel, the grid, and the numbers between its pointers."""
    parameters = plugin.KernelLaunchParams(grid_x=given.value_heads, block_x=THREADS)
    numbers = plugin.SymIntExprs(len(given.numbers))
    for i, number in enumerate(given.numbers):
        numbers[i] = plugin.SymInt32(number)
    return given.kernel, unpack_ptx(given.ptx), parameters, numbers


def _with_signature(function: Callable[..., Any], arguments: dict[str, Any], result: Any) -> Callable[..., Any]:
    """The function, as if it had been written with these arguments."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in arguments.items()]

    def called(*given: Any, **named: Any) -> Any:
        bound = inspect.Signature(parameters).bind(*given, **named)
        return function(*bound.arguments.values())

    called.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    called.__annotations__ = {**arguments, "return": result}
    called.__name__ = function.__name__
    return called
