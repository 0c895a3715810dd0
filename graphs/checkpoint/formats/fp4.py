"""NVFP4: two E2M1 numbers in a byte, the first in the low half, an FP8 scale per 16 inputs and one fp32 scale per tensor.

ModelOpt: w = code * weight_scale * weight_scale_2. compressed-tensors: w = code * (weight_scale / weight_global_scale).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_export.graphs.checkpoint.formats.logical_tensor import Floats, LogicalTensor, Parts, Tensors, checked_scales, part
from qwen_export.graphs.checkpoint.formats.storage_format import unpacked_sizes
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo

GROUP = 16
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Both numbers of a byte at once.
_PAIR = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)


@dataclass(frozen=True)
class Fp4Tensor(LogicalTensor):
    packed: TensorInfo
    scale: TensorInfo
    tensor_scale: TensorInfo
    divides: bool
    """Whether the tensor's scale divides (compressed-tensors) or multiplies (ModelOpt)."""

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def storage(self) -> str:
        return "nvfp4"

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.packed, self.scale, self.tensor_scale

    def rows(self, parts: Parts, start: int, stop: int) -> Floats:
        values = _PAIR[parts.stored(self.packed, start, stop).view(np.uint8)].reshape(stop - start, -1, GROUP)
        scales = checked_scales(self.scale, parts.stored(self.scale, start, stop))
        tensor_scale = checked_scales(self.tensor_scale, parts.whole(self.tensor_scale)).reshape(())
        if self.divides:
            scales /= tensor_scale
        else:
            scales *= tensor_scale
        values *= scales[:, :, None]
        return values.reshape(stop - start, -1)


def fp4_tensor(tensors: Tensors, packed: TensorInfo, name: str, scale: str, tensor_scale: str, *, divides: bool) -> Fp4Tensor:
    """The weight `name` of these three parts."""
    outputs, pairs = unpacked_sizes(packed.name, packed.shape)
    inputs = pairs * 2
    part(tensors, name, packed.name, packed.shape, ("U8",))
    scales = part(tensors, name, scale, (outputs, -(-inputs // GROUP)), ("F8_E4M3",))
    single = tensors.get(tensor_scale)
    shape = single.shape if single is not None and single.shape in ((), (1,)) else ()
    return Fp4Tensor(name, (outputs, inputs), packed, scales, part(tensors, name, tensor_scale, shape, ("F32",)), divides)
