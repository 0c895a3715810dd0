"""compressed-tensors, what llm-compressor writes: each group of modules has a layout of its own, told by the parts that lie there.

pack-quantized       X.weight_packed i32[O, I*bits/32], X.weight_scale [O, G], X.weight_shape i64[2], asymmetric also
                     X.weight_zero_point i32[O*bits/32, G]; codes are stored plus 2^(bits-1)
nvfp4-pack-quantized X.weight_packed u8[O, I/2], X.weight_scale f8[O, I/16], X.weight_global_scale f32[1], a divisor
float-quantized      X.weight f8[O, I], X.weight_scale per tensor, channel or block
int-quantized        X.weight i8[O, I], X.weight_scale per tensor or channel
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_export.errors import CheckpointError, UnsupportedError
from qwen_export.graphs.checkpoint.formats.fp4 import fp4_tensor
from qwen_export.graphs.checkpoint.formats.integer_codes import IntegerTensor, unpack, zeros_of
from qwen_export.graphs.checkpoint.formats.logical_tensor import Codes, LogicalTensor, Parts, Tensors, checked_scales, part
from qwen_export.graphs.checkpoint.formats.scaled_values import SCALE_TYPES, scaled_tensor
from qwen_export.graphs.checkpoint.formats.storage_format import Format, unpacked_sizes
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo

LAYOUTS = ("pack-quantized", "nvfp4-pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense")


@dataclass(frozen=True)
class PackedTensor(IntegerTensor):
    packed: TensorInfo
    zero_point: TensorInfo | None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.packed, self.scales, *((self.zero_point,) if self.zero_point else ()))

    def codes(self, parts: Parts, start: int, stop: int) -> Codes:
        codes = unpack(parts.stored(self.packed, start, stop), self.bits).reshape(stop - start, -1)
        scales = checked_scales(self.scales, parts.stored(self.scales, start, stop))
        zeros = None
        if self.zero_point is not None:
            per_word = 32 // self.bits
            first = start // per_word
            words = parts.stored(self.zero_point, first, -(-stop // per_word)).T  # packed along O
            unpacked = unpack(words, self.bits).reshape(words.shape[0], -1)
            zeros = zeros_of(self, unpacked[:, start - first * per_word : stop - first * per_word].T)
        return Codes(codes, scales, zeros, self.group, self.bits)


class CompressedTensors(Format):
    method = "compressed-tensors"
    part_suffixes = (".weight_packed", ".weight_scale", ".weight_global_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")
    activation_suffixes = (
        *(".input_scale", ".input_global_scale", ".input_zero_point", ".output_scale"),
        *(".k_scale", ".v_scale", ".q_scale"),
    )

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        if settings.get("format") is not None:
            self.only("format", *LAYOUTS)
        sparsity = settings.get("sparsity_config")
        if sparsity and isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
            raise self.refuse("sparsity_config", "weights that are not sparse")
        groups = settings.get("config_groups")
        schemes = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
        self._schemes = [scheme for scheme in schemes if isinstance(scheme, dict)]
        if any(scheme.get("actorder") in ("group", True) for scheme in self._schemes):
            raise UnsupportedError(
                "this variant of compressed-tensors quantization is not supported",
                where="quantization_config 'actorder'",
                got="'group'",
                expected="'weight' or none, so that the inputs of a group are neighbors",
            )

    def weight(self, info: TensorInfo, tensors: Tensors) -> LogicalTensor | None:
        if info.name.endswith(".weight_packed"):
            weight = info.name.removesuffix("_packed")
            if info.dtype == "U8":
                return fp4_tensor(tensors, info, weight, weight + "_scale", weight + "_global_scale", divides=True)
            return self._packed(info, weight, tensors)
        scale = info.name + "_scale"
        if not info.name.endswith(".weight") or info.dtype not in ("F8_E4M3", "I8"):
            return None
        if info.name + "_zero_point" in tensors:
            raise UnsupportedError("asymmetric 8-bit weights are not supported", where=info.name)
        return scaled_tensor(tensors, info, scale, self._block(info, tensors.get(scale)))

    def _block(self, info: TensorInfo, scale: TensorInfo | None) -> tuple[int, int] | None:
        """Rows and columns of a block, where one of the schemes has blocks and the scales' shape says that this weight is of it."""
        for scheme in self._schemes:
            block = scheme.get("block_structure")
            if scheme.get("strategy") != "block" or not isinstance(block, list) or len(block) != 2 or scale is None:
                continue
            grid = tuple(-(-size // part) for size, part in zip(info.shape[-2:], block, strict=True))
            if scale.shape == grid or len(self._schemes) == 1:
                return (int(block[0]), int(block[1]))
        return None

    def _packed(self, info: TensorInfo, weight: str, tensors: Tensors) -> PackedTensor:
        outputs, words = unpacked_sizes(info.name, info.shape)
        part(tensors, weight, info.name, info.shape, ("I32",))
        scales = tensors.get(weight + "_scale")
        if scales is None:
            raise CheckpointError("a quantized weight has no scales", where=weight, expected=weight + "_scale", fix="Is a shard missing?")
        groups = scales.shape[-1] if scales.shape else 0
        fitting = {bits for scheme in self._schemes if (bits := scheme.get("num_bits")) in (4, 8) and self._fits(scheme, words, groups)}
        if len(fitting) != 1:
            raise CheckpointError(
                "a packed weight fits none or several of the schemes in config.json",
                where=weight,
                got=f"{words} words and {groups} scales per row",
                expected="one scheme of 4 or 8 bits",
            )
        bits = fitting.pop()
        inputs = words * 32 // bits
        part(tensors, weight, weight + "_scale", (outputs, groups), SCALE_TYPES)
        zeros = None
        if weight + "_zero_point" in tensors:
            zeros = part(tensors, weight, weight + "_zero_point", (-(-outputs * bits // 32), groups), ("I32",))
        return PackedTensor(weight, (outputs, inputs), self.method, bits, inputs // groups, zeros is None, True, scales, info, zeros)

    @staticmethod
    def _fits(scheme: Mapping[str, Any], words: int, groups: int) -> bool:
        inputs = words * 32 // int(scheme["num_bits"])
        group = scheme.get("group_size") or inputs
        return groups > 0 and inputs % groups == 0 and inputs // groups == (inputs if group == -1 else group)
