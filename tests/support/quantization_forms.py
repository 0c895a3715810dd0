"""The forms of quantized checkpoints that tests make: how to quantize, the quantization_config, and its name in summaries."""

from __future__ import annotations

from typing import Any

import torch

from tests.support import quantizers

FP8, INT8 = torch.float8_e4m3fn, torch.int8


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": layout}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def int4(**more: Any) -> dict[str, Any]:
    return {"bits": 4, "group_size": 128, **more}


# Name: how to quantize, quantization_config, how a quantized weight is called.
FORMS: dict[str, tuple[quantizers.Quantizer, dict[str, Any], str]] = {
    "fp8": (quantizers.block_fp8(), {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}, "fp8 128x128"),
    "fp8-f32-scales": (quantizers.block_fp8(torch.float32), {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8 128x128"),
    "fp8-small-blocks": (quantizers.block_fp8(block=48), {"quant_method": "fp8", "weight_block_size": [48, 48]}, "fp8 48x48"),
    "gptq": (quantizers.gptq(128), int4(quant_method="gptq", sym=True, desc_act=False), "gptq int4 g128"),
    "gptq-asymmetric": (quantizers.gptq(128, symmetric=False), int4(quant_method="gptq", sym=False), "gptq int4 g128"),
    "gptq-v2": (quantizers.gptq(128, v2=True, g_idx=False), int4(quant_method="gptq", checkpoint_format="gptq_v2"), "gptq int4 g128"),
    "gptq-act-order": (quantizers.gptq(32, act_order=True), int4(quant_method="gptq", desc_act=True, group_size=32), "gptq int4 g32"),
    "awq": (quantizers.awq(128), int4(quant_method="awq", zero_point=True, version="gemm"), "awq int4 g128"),
    "awq-symmetric": (quantizers.awq(128, symmetric=True, with_zeros=False), int4(quant_method="awq", zero_point=False), "awq int4 g128"),
    "packed": (
        quantizers.pack_quantized(128),
        compressed("pack-quantized", num_bits=4, type="int", symmetric=True, strategy="group", group_size=128),
        "compressed-tensors int4 g128",
    ),
    "packed-asymmetric": (
        quantizers.pack_quantized(64, symmetric=False),
        compressed("pack-quantized", num_bits=4, type="int", symmetric=False, strategy="group", group_size=64),
        "compressed-tensors int4 g64",
    ),
    "nvfp4": (
        quantizers.nvfp4(modelopt=False),
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        "nvfp4",
    ),
    "nvfp4-modelopt": (quantizers.nvfp4(modelopt=True), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
    "fp8-modelopt": (quantizers.scaled(FP8, "scalar"), {"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8 per tensor"),
    "fp8-channel": (
        quantizers.scaled(FP8, "channel"),
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        "fp8 per channel",
    ),
    "fp8-block": (
        quantizers.scaled(FP8, "block"),
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
        "fp8 128x128",
    ),
    "int8-channel": (
        quantizers.scaled(INT8, "channel"),
        compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        "int8 per channel",
    ),
}
ON_A_GRID = ("gptq", "gptq-asymmetric", "gptq-v2", "awq", "awq-symmetric", "packed", "packed-asymmetric")
