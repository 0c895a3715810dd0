"""The library of CUDA kernels, `libqwen_export_cuda.so`: built by build.sh here, found when a bundle is built, carried by the bundle.

Imports neither torch nor onnx. A machine without the library builds bundles with ONNX Runtime's own kernels.
"""

from __future__ import annotations

import os
from pathlib import Path

from qwen_export.errors import UnsupportedError
from qwen_export.runtimes.onnxruntime_kernels import Kernels

NATIVE = "qwen.native"
"""The domain of its ops."""

LIBRARY = "libqwen_export_cuda.so"
VARIABLE = "QWEN_EXPORT_CUDA_PLUGIN"
"""Path of the library, where it does not lie next to this file; empty: build without it."""

_HALF = frozenset({"float16", "bfloat16"})
OPS = {"Linear": _HALF, "SwiGlu": _HALF, "DeltaNet": _HALF | {"float"}}
"""Element types of each op."""


def find_library() -> Path | None:
    """The library, None when there is none. Raises UnsupportedError when the variable names a file that does not exist."""
    given = os.environ.get(VARIABLE)
    if given is None:
        path = Path(__file__).parent / LIBRARY
        return path if path.is_file() else None
    if given and not Path(given).is_file():
        raise UnsupportedError("the CUDA plugin library is not there", where=VARIABLE, got=given, fix=f"Correct or unset {VARIABLE}.")
    return Path(given) if given else None


def with_native(kernels: Kernels) -> Kernels:
    """The kernels of a CUDA device, with those of the library where it is found."""
    if kernels.device != "cuda" or find_library() is None:
        return kernels
    return Kernels(kernels.device, kernels.source, kernels.types | {(NATIVE, op): [{"T": types}] for op, types in OPS.items()})
