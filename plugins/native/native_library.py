"""The libraries of kernels, one per device: built by the build.sh here and in cpu/, found when a bundle is built, carried by the bundle.

Imports neither torch nor onnx. A machine without a library builds bundles with ONNX Runtime's own kernels.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from qwen_export.errors import UnsupportedError
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import Kernels

NATIVE = "qwen.native"
"""The domain of its ops."""


@dataclass(frozen=True)
class NativeLibrary:
    """The library of one device. `variable` is the path of the file, where it does not lie next to this one; empty: build without it.
    `ops` has the element types of each op's activations."""

    file: str
    variable: str
    ops: dict[str, frozenset[str]]


_FLOAT, _HALF = frozenset({"float"}), frozenset({"float16", "bfloat16"})
_CPU_OPS = (
    *("Linear", "SwiGlu", "QuantLinear", "QuantSwiGlu", "QuantGather", "Moe", "QuantMoe"),
    *("GatedAttention", "DeltaNetTransaction", "TopLogits"),
)
FP8_LINEAR = "Fp8Linear"
"""The op of a product with an fp8 matrix; a device that has it has the others of fp8, too."""
_CUDA_PRODUCTS = ("Linear", "SwiGlu", "QuantLinear", "QuantSwiGlu", "QuantMoe", FP8_LINEAR, "Fp8SwiGlu", "Fp8Moe")
_TOWER = ("PictureAttention", "ResidualNorm", "BiasGelu")
_MIXTURE = ("RmsNorm", "SharedExpertSum", "QuantMixture")
_CUDA_OPS = dict.fromkeys((*_CUDA_PRODUCTS, *_TOWER, *_MIXTURE, "GatedAttention", "Chain", "WideTopLogits"), _HALF) | {
    **dict.fromkeys(("QuantGather", "Fp8Gather"), frozenset({"float16"})),
    "DeltaNet": _HALF | _FLOAT,
    "TopLogits": _FLOAT,
}
LIBRARIES = {
    "cpu": NativeLibrary("libqwen_export_cpu.so", "QWEN_EXPORT_CPU_PLUGIN", dict.fromkeys(_CPU_OPS, _FLOAT)),
    "cuda": NativeLibrary("libqwen_export_cuda.so", "QWEN_EXPORT_CUDA_PLUGIN", _CUDA_OPS),
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
            "the library of native kernels does not exist", where=library.variable, got=given, fix=f"Correct or unset {library.variable}."
        )
    return Path(given) if given else None


def build_script(device: str) -> Path:
    """The script that compiles the library of a device; it is part of the package."""
    folder = Path(__file__).parent
    return folder / "cpu" / "build.sh" if device == "cpu" else folder / "build.sh"


def with_native(kernels: Kernels) -> Kernels:
    """The kernels of a device, with those of its library where that is found."""
    if find_library(kernels.device) is None:
        return kernels
    own = {(NATIVE, op): [{"T": types}] for op, types in LIBRARIES[kernels.device].ops.items()}
    return Kernels(kernels.device, kernels.source, kernels.types | own)


def find_ptx(element: str) -> Path | None:
    """Kernels for engines of TensorRT with activations of a type ("float16"), which build_ptx.sh compiles; None where it was not run."""
    path = Path(__file__).parent / f"delta_net_step.{element}.ptx"
    return path if path.is_file() else None


PTX_SCRIPT = Path(__file__).parent / "build_ptx.sh"
"""Compiles them; it is part of the package."""


def ptx_cuda(ptx: bytes) -> str:
    """The CUDA that a driver must serve to take a PTX: that of the nvcc that wrote it, by the comment at its top. "" without such a
    comment."""
    found = re.search(rb"Cuda compilation tools, release (\d+\.\d+)", ptx[:1000])
    return found[1].decode() if found else ""
