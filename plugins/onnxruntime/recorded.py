"""Kernels of execution providers that the machine which builds does not have.

Recorded from the kernel registry of onnxruntime-gpu 1.31.1 on a CUDA host (`python -m qwen_export.runtimes.onnxruntime_kernels cuda`
prints it). Only the operators that some lowering emits are listed. The target box checks again with what is installed there.
"""

from __future__ import annotations

from qwen_export.errors import UnsupportedError
from qwen_export.runtimes.onnxruntime_kernels import Kernels

_FLOATS = frozenset({"float", "float16", "bfloat16"})
_MS = "com.microsoft"

_CUDA: dict[tuple[str, str], list[dict[str, frozenset[str]]]] = {
    (_MS, "FusedMatMul"): [{"T": _FLOATS}],
    ("", "SimplifiedLayerNormalization"): [{"T": _FLOATS}],
    ("", "Split"): [{"T": _FLOATS}],
    (_MS, "SkipSimplifiedLayerNormalization"): [{"T": _FLOATS}],
    (_MS, "QuickGelu"): [{"T": _FLOATS}],
    (_MS, "CausalConvWithState"): [{"T": _FLOATS}],
    (_MS, "GatedDeltaNet"): [{"T": _FLOATS, "TS": frozenset({"float"})}],
    (_MS, "GatedRMSNorm"): [{"T": _FLOATS}],
    (_MS, "GroupQueryAttention"): [
        {"T": frozenset({"float16"}), "T_CACHE": frozenset({"float16"})},
        {"T": frozenset({"bfloat16"}), "T_CACHE": frozenset({"bfloat16"})},
    ],
}
_RECORDED = {"cuda": Kernels("cuda", "onnxruntime-gpu 1.31.1 (recorded)", _CUDA)}


def recorded(device: str) -> Kernels:
    """The recorded kernels of a device. Raises UnsupportedError for a device of which nothing is recorded."""
    if device not in _RECORDED:
        raise UnsupportedError(
            f"the installed ONNX Runtime has no {device} execution provider, and none is recorded", fix="Install the build of it that does."
        )
    return _RECORDED[device]
