"""Which lowering each op gets on TensorRT, and what is refused. Imports neither torch, onnx nor TensorRT: `inspect` asks it."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.quantization.plan import FP8, PrecisionPlan
from qwen_export.plugins.onnxruntime.choices import Choice

UNQUANTIZED = ("experts",)
"""Groups of the precision plan that have no quantised form here: no layer gathers quantised matrices."""
_FP8_SINCE = 89
_LARGEST_TOP_K = 3840
"""The longest that TensorRT's TopK gives."""


def choose_tensorrt(precision: str, config: TextConfig) -> dict[str, Choice]:
    """The lowering of each op. fp32 has no attention layer, and no cast hides that: it takes products and a softmax."""
    chosen = {
        "linear": "product",
        "rms_norm": "rms_normalization",
        "gated_delta_net": "fused_layers",
        "gated_attention": "decomposed" if precision == "fp32" else "native",
        **({"moe": "gathered"} if config.is_moe else {}),
    }
    return {op: Choice(name, ()) for op, name in chosen.items()}


def refusals(config: TextConfig, quantization: PrecisionPlan | None, sms: Sequence[str]) -> list[str]:
    """A sentence for each thing that TensorRT cannot compile for these GPUs; no `sms`: for the one that is there."""
    reasons = []
    formats = {format.format for format in quantization.groups.values()} if quantization is not None else set()
    old = [sm for sm in sms if int(sm) < _FP8_SINCE]
    if FP8 in formats and old:
        reasons.append(f"fp8 weights need SM {_FP8_SINCE} or newer, and SM {', '.join(old)} is among the targets")
    if config.is_moe and config.num_experts_per_tok > _LARGEST_TOP_K:
        reasons.append(f"TensorRT selects at most {_LARGEST_TOP_K} experts")
    if config.is_moe and quantization is not None and quantization.groups["experts"].quant is not None:
        reasons.append("TensorRT has no layer that gathers quantised matrices: leave [experts] as stored in the precision plan")
    if quantization is not None and any(format.zeros for format in quantization.groups.values()):
        reasons.append("TensorRT dequantises symmetric blocks only: leave out `zeros` in the precision plan")
    return reasons
