"""compressed-tensors, what llm-compressor writes: each group of modules has a layout of its own, known by the parts that are stored.

pack-quantized       X.weight_packed i32[O, I*bits/32], X.weight_scale [O, G], X.weight_shape i64[2], asymmetric also
                     X.weight_zero_point i32[O*bits/32, G]; codes are stored plus 2^(bits-1)
nvfp4-pack-quantized X.weight_packed u8[O, I/2], X.weight_scale f8[O, I/16], X.weight_global_scale f32[1], a divisor
mxfp4-pack-quantized X.weight_packed u8[O, I/2], X.weight_scale u8[O, I/32], a power of two
float-quantized      X.weight f8[O, I], X.weight_scale per tensor, channel, group or block
int-quantized        X.weight i8[O, I], X.weight_scale per tensor or channel

The bits of a packed weight follow from its words and `weight_shape`. Where that is missing, they are those of the one scheme in
`config_groups` whose shapes fit, or whose `targets` name the module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.fp4 import fp4_tensor
from qwen_export.graphs.checkpoint.formats.integer_codes import IntegerTensor, unpack, zeros_of
from qwen_export.graphs.checkpoint.formats.logical_tensor import GridRows, LogicalTensor, Parts, Tensors, checked_scales, part, scales_of
from qwen_export.graphs.checkpoint.formats.scaled_values import ELEMENT_TYPES, SCALE_TYPES, scaled_tensor
from qwen_export.graphs.checkpoint.formats.storage_format import (
    Format,
    group_of_parts,
    matches,
    module_names,
    refuse_module,
    unpacked_sizes,
)
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo, read_small

LAYOUTS = (
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "mixed-precision",
    "dense",
)

PACKED_BITS = (4, 8)


@dataclass(frozen=True)
class PackedTensor(IntegerTensor):
    packed: TensorInfo
    zero_point: TensorInfo | None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.packed, self.scales, *((self.zero_point,) if self.zero_point else ()))

    def codes(self, parts: Parts, start: int, stop: int) -> GridRows:
        codes = unpack(parts.stored(self.packed, start, stop), self.bits).reshape(stop - start, -1)[:, : self.shape[1]]
        scales = checked_scales(self.scales, parts.stored(self.scales, start, stop))
        zeros = None
        if self.zero_point is not None:
            per_word = 32 // self.bits
            first = start // per_word
            words = parts.stored(self.zero_point, first, -(-stop // per_word)).T  # packed along O
            unpacked = unpack(words, self.bits).reshape(words.shape[0], -1)
            zeros = zeros_of(self, unpacked[:, start - first * per_word : stop - first * per_word].T)
        return GridRows(codes, scales, zeros, self.group, self.bits)


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
        self._groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
        self._schemes = [scheme for group in self._groups if isinstance(scheme := group.get("weights"), dict)]
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def weight(self, info: TensorInfo, tensors: Tensors) -> LogicalTensor | None:
        if info.name.endswith(".weight_packed"):
            weight = info.name.removesuffix("_packed")
            if info.dtype == "U8":
                return fp4_tensor(tensors, info, weight, weight + "_scale", weight + "_global_scale", divides=True)
            return self._packed(info, weight, tensors)
        scale = info.name + "_scale"
        if not info.name.endswith(".weight") or info.dtype not in ELEMENT_TYPES:
            return None
        if info.name + "_zero_point" in tensors:
            raise refuse_module(self.method, info.name, "8 bits with zero points", "symmetric weights of 8 bits")
        return scaled_tensor(tensors, info, scale, self._block(info, tensors.get(scale)))

    def _block(self, info: TensorInfo, scale: TensorInfo | None) -> tuple[int, int] | None:
        """Rows and columns of a block, where one of the schemes has blocks and the scales' shape is that of its blocks."""
        for scheme in self._schemes:
            block = scheme.get("block_structure")
            if scheme.get("strategy") != "block" or scale is None or len(info.shape) < 2:
                continue
            if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
                raise self.refuse("config_groups", "block_structure with the rows and columns of a block, as in [128, 128]")
            grid = tuple(-(-size // part) for size, part in zip(info.shape[-2:], block, strict=True))
            if scale.shape == grid or len(self._schemes) == 1:
                return (block[0], block[1])
        return None

    def _packed(self, info: TensorInfo, weight: str, tensors: Tensors) -> PackedTensor:
        outputs, words = unpacked_sizes(info.name, info.shape)
        part(tensors, weight, info.name, info.shape, ("I32",))
        if weight + "_g_idx" in tensors:
            raise refuse_module(self.method, weight, "inputs in another order (actorder 'group')", "actorder 'weight' or none")
        stored = scales_of(tensors, weight, weight + "_scale")
        groups = stored.shape[-1] if len(stored.shape) == 2 else 1
        bits, inputs = self._bits(info, weight, tensors, outputs, words, groups)
        group = group_of_parts(self.method, weight, inputs, groups, self._group_size(bits))
        scales = part(tensors, weight, weight + "_scale", (outputs, groups), SCALE_TYPES)
        zeros = None
        if weight + "_zero_point" in tensors:
            zeros = part(tensors, weight, weight + "_zero_point", (-(-outputs * bits // 32), groups), ("I32",))
        return PackedTensor(weight, (outputs, inputs), self.method, bits, group, zeros is None, True, scales, info, zeros)

    def _bits(self, info: TensorInfo, weight: str, tensors: Tensors, outputs: int, words: int, groups: int) -> tuple[int, int]:
        """Bits and inputs of a packed weight."""
        shape = self._shape(weight + "_shape", tensors)
        if shape is not None:
            found = [bits for bits in range(2, 9) if len(shape) == 2 and shape[0] == outputs and -(-shape[1] // (32 // bits)) == words]
            if any(bits in PACKED_BITS for bits in found):
                return next(bits for bits in found if bits in PACKED_BITS), shape[1]
            found_bits = " or ".join(map(str, found)) or f"{words} words for a weight of shape {shape}"
            raise refuse_module(self.method, weight, found_bits, "4 or 8 bits")
        fitting = {bits for scheme in self._schemes if (bits := scheme.get("num_bits")) in PACKED_BITS and _fits(scheme, words, groups)}
        if len(fitting) > 1:
            fitting &= {scheme.get("num_bits") for scheme in self._targeting(info, weight.removesuffix(".weight"))}
        if len(fitting) != 1:
            raise CheckpointError(
                "a packed weight has no weight_shape, and fits none or several of the schemes in config.json",
                where=weight,
                got=f"{words} words and {groups} scales per row",
                expected="one scheme of 4 or 8 bits",
                fix="Save the model again with llm-compressor, or give the BF16 release.",
            )
        bits = int(fitting.pop())
        return bits, words * 32 // bits

    def _shape(self, name: str, tensors: Tensors) -> tuple[int, ...] | None:
        """The contents of a `weight_shape`; all of them are read at once."""
        if self._shapes is None:
            self._shapes = read_small(info for other, info in tensors.items() if other.endswith(".weight_shape"))
        return self._shapes.get(name)

    def _group_size(self, bits: int) -> object:
        return next((scheme.get("group_size") for scheme in self._schemes if scheme.get("num_bits") == bits), None)

    def _targeting(self, info: TensorInfo, module: str) -> list[Mapping[str, Any]]:
        """The schemes whose targets name the module: exactly, or by a pattern that begins with `re:`."""
        names = set(module_names(info, module))
        named = []
        for group in self._groups:
            targets = group.get("targets")
            for target in targets if isinstance(targets, list) else ():
                pattern = target.removeprefix("re:") if isinstance(target, str) and target.startswith("re:") else None
                if target in names or (pattern is not None and any(matches(pattern, name) for name in names)):
                    named.append(group.get("weights") or {})
        return named


def _fits(scheme: Mapping[str, Any], words: int, groups: int) -> bool:
    inputs = words * 32 // int(scheme["num_bits"])
    size = scheme.get("group_size")
    group = size if type(size) is int and size > 0 else inputs
    return groups > 0 and inputs % groups == 0 and inputs // groups == group
