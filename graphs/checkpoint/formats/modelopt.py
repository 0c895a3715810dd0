"""NVIDIA ModelOpt: NVFP4 (`X.weight` u8, `weight_scale`, `weight_scale_2`) and FP8 (`X.weight` with one `weight_scale`), also mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.fp4 import fp4_tensor
from qwen_export.graphs.checkpoint.formats.logical_tensor import LogicalTensor, Tensors
from qwen_export.graphs.checkpoint.formats.scaled_values import scaled_tensor
from qwen_export.graphs.checkpoint.formats.storage_format import Format
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo

ALGORITHMS = ("NVFP4", "FP8", "MIXED_PRECISION", "W4A16_NVFP4", "FP8_PER_CHANNEL_PER_TOKEN")


class ModelOpt(Format):
    method = "modelopt"
    part_suffixes = (".weight_scale", ".weight_scale_2")
    activation_suffixes = (".input_scale", ".k_scale", ".v_scale", ".k_proj.output_scale", ".v_proj.output_scale")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        nested = settings.get("quantization")
        algorithm = settings.get("quant_algo", nested.get("quant_algo") if isinstance(nested, dict) else None)
        if algorithm not in ALGORITHMS:
            raise self.refuse("quant_algo", " or ".join(ALGORITHMS))

    def weight(self, info: TensorInfo, tensors: Tensors) -> LogicalTensor | None:
        if not info.name.endswith(".weight") or info.dtype not in ("U8", "F8_E4M3"):
            return None
        scale = info.name + "_scale"
        if scale not in tensors:
            raise CheckpointError("a quantized weight has no scales", where=info.name, expected=scale, fix="Is a shard missing?")
        if info.dtype == "U8":
            return fp4_tensor(tensors, info, info.name, scale, info.name + "_scale_2", divides=False)
        return scaled_tensor(tensors, info, scale)
