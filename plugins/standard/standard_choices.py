"""Which lowering each op gets on the targets with standard operators. Imports neither torch nor onnx: `inspect` uses it."""

from __future__ import annotations

from collections.abc import Collection

from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.passes.lowering_choice import Choice

_RMS_NORMALIZATION_SINCE = 23
_LINEAR = {"onnx": "turned_product", "directml": "gemm"}
_DELTA_NET = {"onnx": "chunked_channels", "directml": "chunked"}
_ATTENTION = {"onnx": "scattered_cache", "directml": "one_token_kernel"}


def choose_standard(target: str, config: TextConfig, opset: int, decompose: Collection[str]) -> dict[str, Choice]:
    """The lowering of each op for target "onnx" or "directml"."""
    chosen = {
        "linear": _LINEAR[target],
        "rms_norm": _norm(target, opset, decompose),
        "gated_delta_net": _DELTA_NET[target],
        "gated_attention": _ATTENTION[target],
        **({"moe": "gathered"} if config.is_moe else {}),
    }
    return {op: Choice(name, ()) for op, name in chosen.items()}


def choose_standard_vision() -> dict[str, Choice]:
    """The same for the ops of a bundle that reads pictures."""
    return {op: Choice(name, ()) for op, name in (("picture_attention", "masked_parts"), ("place_features", "where"))}


def _norm(target: str, opset: int, decompose: Collection[str]) -> str:
    if "rmsnorm" in decompose:
        return "decomposed"
    if target == "directml":
        return "simplified_norm"
    return "rms_normalization" if opset >= _RMS_NORMALIZATION_SINCE else "decomposed"
