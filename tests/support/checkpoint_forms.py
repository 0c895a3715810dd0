"""The forms of checkpoints that are tried: quantizers, layouts and fine-tuning tools. Tests read them, and the matrix in the documents
lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.support import quantizers

FP8, INT8 = torch.float8_e4m3fn, torch.int8


@dataclass(frozen=True)
class QuantizedForm:
    """`tool`: who writes it, with the version whose files or sources the layout follows, where known. `becomes`: the forms of storage that
    `inspect` counts."""

    tool: str
    layout: str
    quantizer: quantizers.Quantizer
    config: dict[str, Any]
    becomes: tuple[str, ...]


def compressed(layout: str, *groups: dict[str, Any]) -> dict[str, Any]:
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": named, "ignore": ["lm_head"]}


def scheme(targets: list[str], **weights: Any) -> dict[str, Any]:
    return {"targets": targets, "weights": {"symmetric": True, "dynamic": False, **weights}}


def int4(**more: Any) -> dict[str, Any]:
    return {"bits": 4, "group_size": 128, **more}


def auto_round(packing: str | None = "auto_round:auto_gptq", **more: Any) -> dict[str, Any]:
    packed = {"packing_format": packing} if packing else {}
    return {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int", **packed, **more}


_DOWN, _REST = r"mlp\.down_proj", "."
_CHANNEL_4 = scheme([r"re:.*(gate|up|[qkvo]|in|out)_proj.*"], num_bits=4, type="int", strategy="channel", group_size=None)
_CHANNEL_8 = scheme([r"re:.*down_proj$"], num_bits=8, type="int", strategy="channel", group_size=None)
_MIXED_CHANNEL = quantizers.by_module((_DOWN, quantizers.pack_quantized(-1, bits=8)), (_REST, quantizers.pack_quantized(-1)))

MIXED: dict[str, QuantizedForm] = {
    "auto-round gptq": QuantizedForm(
        "AutoRound 0.16", "auto_round:auto_gptq", quantizers.gptq(128, g_idx=False), auto_round(), ("auto-round int4 g128",)
    ),
    "auto-round asymmetric": QuantizedForm(
        "AutoRound 0.16",
        "auto_round, zero points",
        quantizers.gptq(128, symmetric=False, v2=True, g_idx=False),
        auto_round("auto_round", sym=False),
        ("auto-round int4 g128",),
    ),
    "auto-round awq": QuantizedForm(
        "AutoRound 0.16", "auto_round:auto_awq", quantizers.awq(128), auto_round("auto_round:auto_awq"), ("auto-round int4 g128",)
    ),
    "auto-round mixed": QuantizedForm(
        "AutoRound 0.16",
        "auto_round:auto_gptq, 4 and 8 bits, groups of 32 and 128",
        quantizers.by_module((_DOWN, quantizers.gptq(32, bits=8, g_idx=False)), (_REST, quantizers.gptq(128, g_idx=False))),
        auto_round(extra_config={r".*mlp\.down_proj": {"bits": 8, "group_size": 32}}),
        ("auto-round int4 g128", "auto-round int8 g32"),
    ),
    "auto-round fp8 channel": QuantizedForm(
        "AutoRound 0.16",
        "fp8_static, a scale per row",
        quantizers.flat_fp8("channel"),
        auto_round("auto_round:fp8_static"),
        ("fp8 per channel",),
    ),
    "auto-round fp8 tensor": QuantizedForm(
        "AutoRound 0.16", "fp8, one scale", quantizers.flat_fp8("tensor"), auto_round(None, data_type="fp8"), ("fp8 per tensor",)
    ),
    "auto-round fp8 group": QuantizedForm(
        "AutoRound 0.16", "fp8, groups of 32", quantizers.flat_fp8("group"), auto_round(None, data_type="fp8"), ("fp8 1x32",)
    ),
    "auto-round nvfp4": QuantizedForm(
        "AutoRound 0.16",
        "auto_round:llm_compressor, NVFP4",
        quantizers.nvfp4(modelopt=False),
        auto_round("auto_round:llm_compressor"),
        ("nvfp4",),
    ),
    "auto-round mxfp4": QuantizedForm(
        "AutoRound 0.16", "auto_round:llm_compressor, MXFP4", quantizers.mxfp4, auto_round("auto_round:llm_compressor"), ("mxfp4",)
    ),
    "packed mixed": QuantizedForm(
        "llm-compressor",
        "pack-quantized, 4 and 8 bits, a scale per row",
        _MIXED_CHANNEL,
        compressed("pack-quantized", _CHANNEL_4, _CHANNEL_8),
        ("compressed-tensors int4", "compressed-tensors int8"),
    ),
    "packed mixed, targets": QuantizedForm(
        "llm-compressor",
        "pack-quantized without weight_shape, by targets",
        quantizers.by_module(
            (_DOWN, quantizers.pack_quantized(-1, bits=8, with_shape=False)), (_REST, quantizers.pack_quantized(-1, with_shape=False))
        ),
        compressed("pack-quantized", _CHANNEL_4, _CHANNEL_8),
        ("compressed-tensors int4", "compressed-tensors int8"),
    ),
    "mxfp4": QuantizedForm(
        "llm-compressor",
        "mxfp4-pack-quantized",
        quantizers.mxfp4,
        compressed("mxfp4-pack-quantized", scheme(["Linear"], num_bits=4, type="float", strategy="group", group_size=32)),
        ("mxfp4",),
    ),
    "mixed precision": QuantizedForm(
        "llm-compressor",
        "mixed-precision: NVFP4 and FP8 per row",
        quantizers.by_module((_DOWN, quantizers.scaled(FP8, "channel")), (_REST, quantizers.nvfp4(modelopt=False))),
        compressed("mixed-precision", scheme(["Linear"], num_bits=4, type="float", strategy="tensor_group", group_size=16)),
        ("fp8 per channel", "nvfp4"),
    ),
    "gptq dynamic": QuantizedForm(
        "GPTQModel",
        "gptq with dynamic: 4 and 8 bits, groups of 32 and 128",
        quantizers.by_module((_DOWN, quantizers.gptq(32, bits=8)), (_REST, quantizers.gptq(128))),
        int4(quant_method="gptq", sym=True, dynamic={r"+:.*\.mlp\.down_proj.*": {"bits": 8, "group_size": 32}, "-:.*visual.*": {}}),
        ("gptq int4 g128", "gptq int8 g32"),
    ),
    "gptq dynamic symmetry": QuantizedForm(
        "GPTQModel",
        "gptq with dynamic: single modules with zero points",
        quantizers.by_module((_DOWN, quantizers.gptq(128, symmetric=False)), (_REST, quantizers.gptq(128))),
        int4(quant_method="gptq", sym=True, dynamic={r"model\.language_model\.layers\.\d+\.mlp\.down_proj": {"sym": False}}),
        ("gptq int4 g128",),
    ),
    "gptq 8 bits": QuantizedForm(
        "AutoGPTQ", "gptq, 8 bits", quantizers.gptq(128, bits=8), {**int4(quant_method="gptq"), "bits": 8}, ("gptq int8 g128",)
    ),
    "fp8 mixed": QuantizedForm(
        "transformers 5.17",
        "fp8: blocks of 128x128 and a scale per row",
        quantizers.by_module((_DOWN, quantizers.scaled(FP8, "channel")), (_REST, quantizers.block_fp8())),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        ("fp8 128x128", "fp8 per channel"),
    ),
    "modelopt mixed": QuantizedForm(
        "ModelOpt",
        "MIXED_PRECISION: NVFP4 and FP8",
        quantizers.by_module((_DOWN, quantizers.scaled(FP8, "scalar")), (_REST, quantizers.nvfp4(modelopt=True))),
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        ("fp8 per tensor", "nvfp4"),
    ),
}
"""Forms that are decided per module."""
