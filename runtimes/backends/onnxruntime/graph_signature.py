"""The signature of a loaded graph against the one in the manifest: the buffers of a call are made and bound by the manifest's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_export.errors import BundleError
from qwen_export.manifest import GraphSpec, TensorSpec


def check_signature(native: Any, spec: GraphSpec, path: Path) -> None:
    """Raise BundleError unless the session has the manifest's inputs and outputs, with their element types and shapes."""
    bound = [TensorSpec(weight.name, weight.dtype, weight.shape) for weight in spec.weights if weight.name in spec.bound]
    inputs = (*spec.inputs, *bound)
    for kind, listed, have in (("input", inputs, native.get_inputs()), ("output", spec.outputs, native.get_outputs())):
        wanted = {tensor.name: _form(tensor) for tensor in listed}
        found = {tensor.name: (tensor.type, tuple(tensor.shape)) for tensor in have}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise BundleError(
                    f"the manifest is wrong about an {kind} of the graph",
                    where=f"{path}, {name}",
                    got=wanted.get(name, "none of that name"),
                    expected=found.get(name, "none of that name"),
                    fix="Copy the bundle again, or build it again.",
                )


def _form(tensor: TensorSpec) -> tuple[str, tuple[int | str, ...]]:
    return f"tensor({tensor.dtype})", tensor.shape
