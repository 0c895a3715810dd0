"""FP4: two E2M1 numbers in a byte, the first in the low half.

NVFP4 has an FP8 scale per 16 inputs and one fp32 scale per tensor. ModelOpt: w = code * weight_scale * weight_scale_2. compressed-tensors
and AutoRound: w = code * (weight_scale / weight_global_scale). MXFP4 has a power of two per 32 inputs: w = code * 2^(weight_scale - 127).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_export.graphs.checkpoint.formats.logical_tensor import Floats, LogicalTensor, Parts, Tensors, checked_scales, part, scales_of
from qwen_export.graphs.checkpoint.formats.storage_format import group_of_parts, unpacked_sizes
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo

_NV_GROUP, _MX_GROUP = 16, 32
_POWERS = ("U8", "F8_E8M0")
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Both numbers of a byte at once.
_PAIR = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)


@dataclass(frozen=True)
class Fp4Tensor(LogicalTensor):
    """`tensor_scale` is None for MXFP4; it `divides` in compressed-tensors and multiplies in ModelOpt."""

    packed: TensorInfo
    scale: TensorInfo
    tensor_scale: TensorInfo | None
    divides: bool

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def storage(self) -> str:
        return "mxfp4" if self.tensor_scale is None else "nvfp4"

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.packed, self.scale, *((self.tensor_scale,) if self.tensor_scale else ()))

    def rows(self, parts: Parts, start: int, stop: int) -> Floats:
        group = _MX_GROUP if self.tensor_scale is None else _NV_GROUP
        values = _PAIR[parts.stored(self.packed, start, stop).view(np.uint8)].reshape(stop - start, -1, group)
        scales = checked_scales(self.scale, parts.stored(self.scale, start, stop))
        if self.tensor_scale is not None:
            tensor_scale = checked_scales(self.tensor_scale, parts.whole(self.tensor_scale), divides=self.divides).reshape(())
            scales = scales / tensor_scale if self.divides else scales * tensor_scale
        values *= scales[:, :, None]
        return values.reshape(stop - start, -1)


def fp4_tensor(tensors: Tensors, packed: TensorInfo, name: str, scale: str, tensor_scale: str, *, divides: bool) -> Fp4Tensor:
    """The weight `name` of these parts. Without a scale of the tensor it is MXFP4."""
    outputs, pairs = unpacked_sizes(packed.name, packed.shape)
    inputs, single = pairs * 2, tensors.get(tensor_scale)
    part(tensors, name, packed.name, packed.shape, ("U8",))
    if single is None and scales_of(tensors, name, scale).dtype in _POWERS:
        group_of_parts("mxfp4", name, inputs, -(-inputs // _MX_GROUP))
        return Fp4Tensor(
            name, (outputs, inputs), packed, part(tensors, name, scale, (outputs, inputs // _MX_GROUP), _POWERS), None, divides
        )
    group_of_parts("nvfp4", name, inputs, -(-inputs // _NV_GROUP))
    scales = part(tensors, name, scale, (outputs, inputs // _NV_GROUP), ("F8_E4M3",))
    shape = single.shape if single is not None and single.shape in ((), (1,)) else ()
    return Fp4Tensor(name, (outputs, inputs), packed, scales, part(tensors, name, tensor_scale, shape, ("F32",)), divides)
