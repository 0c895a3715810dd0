"""Kernels of ONNX Runtime builds that cannot be queried: those for a device that this machine lacks, and onnxruntime-gpu, whose registry
crashes the process when its TensorRT provider finds no TensorRT.

Only operators that some lowering emits are listed. CUDA: those of onnxruntime-gpu 1.31.1, run in fp16 and bf16 on an H200; its
GroupQueryAttention takes no fp32. Those of the vision tower are read off its library and have not run. CPU: as the registry of onnxruntime
1.31.1 answers. The target box looks again when it loads the graph.
"""

from __future__ import annotations

from qwen_export.errors import UnsupportedError
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import Kernels

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
    (_MS, "MoE"): [{"T": _FLOATS}],
    (_MS, "GroupQueryAttention"): [
        {"T": frozenset({"float16"}), "T_CACHE": frozenset({"float16"})},
        {"T": frozenset({"bfloat16"}), "T_CACHE": frozenset({"bfloat16"})},
    ],
    **{(_MS, op): [{"T": _FLOATS}] for op in ("MultiHeadAttention", "RotaryEmbedding")},
    **{("", op): [{"T": _FLOATS}] for op in ("Gelu", "LayerNormalization", "ScatterND")},
}
_FLOAT, _FLOAT_OR_HALF = frozenset({"float"}), frozenset({"float", "float16"})
_CPU: dict[tuple[str, str], list[dict[str, frozenset[str]]]] = {
    (_MS, "FusedMatMul"): [{"T": _FLOAT}],
    ("", "SimplifiedLayerNormalization"): [{"T": _FLOATS}],
    ("", "Split"): [{"T": _FLOATS}],
    (_MS, "SkipSimplifiedLayerNormalization"): [{"T": _FLOATS}],
    (_MS, "QuickGelu"): [{"T": _FLOAT}],
    (_MS, "CausalConvWithState"): [{"T": _FLOAT}],
    (_MS, "LinearAttentionGate"): [{"T": _FLOAT_OR_HALF, "TF": _FLOAT}],
    (_MS, "LinearAttention"): [{"T": _FLOAT}],
    (_MS, "GatedRMSNorm"): [{"T": _FLOAT_OR_HALF}],
    (_MS, "MoE"): [{"T": _FLOAT}],
    (_MS, "GroupQueryAttention"): [{"T": _FLOAT, "T_CACHE": _FLOAT}, {"T": frozenset({"float16"}), "T_CACHE": frozenset({"float16"})}],
    (_MS, "MultiHeadAttention"): [{"T": _FLOAT}],
    (_MS, "RotaryEmbedding"): [{"T": _FLOAT_OR_HALF}],
    ("", "Gelu"): [{"T": _FLOAT}],
    ("", "LayerNormalization"): [{"T": _FLOATS}],
    ("", "ScatterND"): [{"T": _FLOATS}],
}
_RECORDED = {
    "cuda": Kernels("cuda", "onnxruntime-gpu 1.31.1 (recorded)", _CUDA),
    "cpu": Kernels("cpu", "onnxruntime 1.31.1 (recorded)", _CPU),
}


def recorded(device: str) -> Kernels:
    """The recorded kernels of a device. Raises UnsupportedError for a device of which nothing is recorded."""
    if device not in _RECORDED:
        raise UnsupportedError(
            f"the installed ONNX Runtime does not list its {device} kernels, and none are recorded",
            fix="Install the build of it for this device.",
        )
    return _RECORDED[device]
