"""The libraries of kernels, one per device: built by the build.sh here and in cpu/, found when a bundle is built, carried by the bundle.

Imports neither torch nor onnx. A machine without a library builds bundles with ONNX Runtime's own kernels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qwen_export.errors import UnsupportedError
from qwen_export.runtimes.onnxruntime_kernels import Kernels

NATIVE = "qwen.native"
"""The domain of its ops."""


@dataclass(frozen=True)
class Library:
    """The library of one device. `variable` is the path of the file, where it does not lie next to this one; empty: build without it.
    `ops` are its ops for activations of one of `types`."""

    file: str
    variable: str
    types: frozenset[str]
    ops: tuple[str, ...]


LIBRARIES = {
    "cpu": Library(
        "libqwen_export_cpu.so",
        "QWEN_EXPORT_CPU_PLUGIN",
        frozenset({"float"}),
        ("Linear", "SwiGlu", "QuantLinear", "QuantSwiGlu", "QuantGather", "Moe", "QuantMoe"),
    ),
    "cuda": Library(
        "libqwen_export_cuda.so", "QWEN_EXPORT_CUDA_PLUGIN", frozenset({"float16", "bfloat16"}), ("Linear", "SwiGlu", "DeltaNet")
    ),
}


def find_library(device: str) -> Path | None:
    """The library of a device, None when there is none. Raises UnsupportedError when its variable names a file that does not exist."""
    library = LIBRARIES.get(device)
    if library is None:
        return None
    given = os.environ.get(library.variable)
    if given is None:
        path = Path(__file__).parent / library.file
        return path if path.is_file() else None
    if given and not Path(given).is_file():
        raise UnsupportedError(
            "the library of native kernels is not there", where=library.variable, got=given, fix=f"Correct or unset {library.variable}."
        )
    return Path(given) if given else None


def with_native(kernels: Kernels) -> Kernels:
    """The kernels of a device, with those of its library where that is found."""
    if find_library(kernels.device) is None:
        return kernels
    library = LIBRARIES[kernels.device]
    return Kernels(kernels.device, kernels.source, kernels.types | {(NATIVE, op): [{"T": library.types}] for op in library.ops})
