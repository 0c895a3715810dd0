"""FP8 as in the FP8 releases: `X` in F8_E4M3 with a sibling `X_scale_inv`, one scale per block of 128x128. Other tools write one scale per
tensor or row, as `X_scale` or `X_scale_inv`.

Despite its name `X_scale_inv` multiplies. A tensor is quantized if and only if it has that sibling; the list of exclusions in config.json
is not needed, and its names do not always match.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.logical_tensor import LogicalTensor, Tensors
from qwen_export.graphs.checkpoint.formats.scaled_values import scaled_tensor
from qwen_export.graphs.checkpoint.formats.storage_format import Format
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo

_SCALES = ("_scale_inv", "_scale")


class BlockFp8(Format):
    method = "fp8"
    part_suffixes = ("_scale_inv", ".weight_scale")
    activation_suffixes = (".activation_scale", ".input_scale")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.only("fmt", "e4m3", "float8_e4m3fn", None)
        block = settings.get("weight_block_size")
        if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise self.refuse("weight_block_size", "the rows and columns of a block, as in [128, 128]")
        self._block = (block[0], block[1]) if block is not None else None

    def weight(self, info: TensorInfo, tensors: Tensors) -> LogicalTensor | None:
        scale = next((info.name + suffix for suffix in _SCALES if info.name + suffix in tensors), None)
        if scale is not None and not info.name.endswith(_SCALES):
            return scaled_tensor(tensors, info, scale, self._block)
        if info.dtype == "F8_E4M3" and not info.name.endswith(_SCALES):
            raise CheckpointError(
                "a quantized weight has no scales", where=info.name, expected=info.name + _SCALES[0], fix="Is a shard missing?"
            )
        return None
