"""Which lowering each op gets on TensorRT, and what is refused. Imports neither torch, onnx nor TensorRT: `inspect` uses it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qwen_export.engine_options import PLUGINS
from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.passes.lowering_choice import Choice
from qwen_export.graphs.quantization.precision_plan import FP8, GroupFormat, PrecisionPlan

UNQUANTIZED = ("experts", "embedding")
"""Groups of the precision plan that have no quantized form here: no layer gathers rows or matrices of a quantized tensor."""
# TensorRT-RTX runs on other GPUs, too (SM 90), but has attention kernels for these only.
_RTX_ATTENTION = frozenset({"80", "86", "89", "120", "121"})
_FP8_SINCE = 89
# Dk, Dv and taps that plugins/native/delta_net_step.cu is compiled for, and from which SM on.
_PLUGIN_SIZES, _PLUGIN_SINCE = ((64, 64, 4), (128, 128, 4)), 80
_LARGEST_TOP_K = 3840
"""The longest that TensorRT's TopK gives."""


def choose_tensorrt(
    flavour: str, precision: str, config: TextConfig, sms: Sequence[str], plugins: Collection[str] = ()
) -> dict[str, Choice]:
    """The lowering of each op; `sms` are the compute capabilities that engines are for, `plugins` the ops that get one of ours."""
    # TensorRT-RTX rounds the operands of fp32 products to TF32 whatever its flag is (1.5 on SM 90: errors of 1e-3 with the flag
    # cleared); products of one row it does not round.
    exact = precision == "fp32" and flavour == "tensorrt-rtx"
    attention = precision != "fp32" and (flavour != "tensorrt-rtx" or (bool(sms) and set(sms) <= _RTX_ATTENTION))
    chosen = {
        "linear": "split_product" if exact else "product",
        "rms_norm": "rms_normalization",
        "gated_delta_net": "plugin" if "gated_delta_net" in plugins else "fused_layers",
        "gated_attention": "native" if attention else "decomposed",
        **({"moe": "gathered"} if config.is_moe else {}),
    }
    return {op: Choice(name, ()) for op, name in chosen.items()}


def refusals(config: TextConfig, quantization: PrecisionPlan | None, sms: Sequence[str], plugins: Collection[str] = ()) -> list[str]:
    """A message for each thing that TensorRT cannot compile for these GPUs; no `sms`: for the GPU of this machine."""
    reasons = []
    formats = {format.format for format in quantization.groups.values()} if quantization is not None else set()
    old = [sm for sm in sms if int(sm) < _FP8_SINCE]
    if FP8 in formats and old:
        reasons.append(f"fp8 weights need SM {_FP8_SINCE} or newer, and SM {', '.join(old)} is among the targets")
    reasons += [f"there is no plugin for {op}, only for {', '.join(PLUGINS)}" for op in plugins if op not in PLUGINS]
    sizes = config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim
    if "gated_delta_net" in plugins and sizes not in _PLUGIN_SIZES:
        reasons.append(
            "our plugin takes heads of 64 or 128 keys and as many values, and 4 taps; this model has {}, {} and {}".format(*sizes)
        )
    if "gated_delta_net" in plugins and any(int(sm) < _PLUGIN_SINCE for sm in sms):
        reasons.append(f"our plugin is compiled for SM {_PLUGIN_SINCE} and newer")
    if config.is_moe and config.num_experts_per_tok > _LARGEST_TOP_K:
        reasons.append(f"TensorRT selects at most {_LARGEST_TOP_K} experts")
    gathered = [group for group in UNQUANTIZED if quantization is not None and quantization.groups[group] != GroupFormat()]
    if gathered:
        reasons.append(f"TensorRT gathers nothing from quantized tensors: the precision plan must leave [{gathered[0]}] stored")
    if quantization is not None and (
        any(format.zeros for format in quantization.groups.values()) or any(keys.get("zeros") for keys in quantization.matrices.values())
    ):
        reasons.append("TensorRT dequantizes symmetric blocks only: leave out `zeros` in the precision plan")
    return reasons
