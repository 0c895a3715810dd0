"""GPTQ: `X.qweight` i32[I*bits/32, O], codes packed along I, lowest bits first; `X.scales` f16[G, O]; `X.qzeros` i32[G, O*bits/32], packed
along O; `X.g_idx` i32[I], the group of each input.

`checkpoint_format` "gptq" stores zero points less one (in bits wide arithmetic), "gptq_v2" as they are. With `desc_act` inputs were
quantized in another order, so that the inputs of a group are not neighbors: such a weight has no grid along its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.integer_codes import Bytes, IntegerTensor, unpack, zeros_of
from qwen_export.graphs.checkpoint.formats.logical_tensor import Codes, Floats, LogicalTensor, Parts, Tensors, checked_scales, part
from qwen_export.graphs.checkpoint.formats.storage_format import Format, unpacked_sizes
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo


@dataclass(frozen=True)
class GptqTensor(IntegerTensor):
    qweight: TensorInfo
    qzeros: TensorInfo
    g_idx: TensorInfo | None
    zero_offset: int

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.qweight, self.qzeros, self.scales, *((self.g_idx,) if self.g_idx else ()))

    def codes(self, parts: Parts, start: int, stop: int) -> Codes | None:
        order = self._groups(parts)
        if (order != np.arange(len(order)) // self.group).any():
            return None
        zeros = zeros_of(self, self._zeros(parts, start, stop))
        return Codes(self._matrix(parts, start, stop), self._scales(parts, start, stop), zeros, self.group, self.bits)

    def rows(self, parts: Parts, start: int, stop: int) -> Floats:
        codes = self.codes(parts, start, stop)
        if codes is not None:
            return codes.values()
        order = self._groups(parts)
        values = self._matrix(parts, start, stop).astype(np.float32)
        stored = self._zeros(parts, start, stop)
        zeros_of(self, stored)
        values -= stored[:, order]
        values *= self._scales(parts, start, stop)[:, order]
        return values

    def _groups(self, parts: Parts) -> Any:
        """The group of every input."""
        count, inputs = self.scales.shape[0], self.shape[1]
        if self.g_idx is None:
            return np.arange(inputs) // self.group
        order = parts.whole(self.g_idx)
        if order.min() < 0 or order.max() >= count:
            raise CheckpointError(
                "g_idx names a group that has no scales", where=self.g_idx.name, got=order.max(), expected=f"0..{count - 1}"
            )
        return order

    def _matrix(self, parts: Parts, start: int, stop: int) -> Bytes:
        """codes [rows, I]; the file has them as columns."""
        words = parts.whole(self.qweight)[:, start:stop].T
        return unpack(words, self.bits).reshape(stop - start, -1)

    def _zeros(self, parts: Parts, start: int, stop: int) -> Bytes:
        per_word = 32 // self.bits
        first = start // per_word
        words = parts.whole(self.qzeros)[:, first : -(-stop // per_word)]
        zeros = unpack(words, self.bits).reshape(len(words), -1)[:, start - first * per_word : stop - first * per_word]
        return (zeros.T + np.uint8(self.zero_offset)) & np.uint8((1 << self.bits) - 1)

    def _scales(self, parts: Parts, start: int, stop: int) -> Floats:
        return checked_scales(self.scales, np.ascontiguousarray(parts.whole(self.scales)[:, start:stop].T))


class Gptq(Format):
    method = "gptq"
    part_suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self._bits = int(self.only("bits", 4, 8))
        # v2 is written as a format of its own; kernels' own layouts (marlin, exllama) are not checkpoints to exchange.
        layout = settings.get("checkpoint_format") or settings.get("format")
        if layout not in (None, "gptq", "gptq_v2"):
            raise self.refuse("checkpoint_format", "'gptq' or 'gptq_v2'")
        self._zero_offset = 0 if layout == "gptq_v2" else 1

    def weight(self, info: TensorInfo, tensors: Tensors) -> LogicalTensor | None:
        if not info.name.endswith(".qweight"):
            return None
        module = info.name.removesuffix(".qweight")
        name, bits = module + ".weight", self._bits
        if info.dtype != "I32":
            raise CheckpointError(
                "a part of a quantized weight has the wrong element type", where=info.name, got=info.dtype, expected="I32"
            )
        words, outputs = unpacked_sizes(info.name, info.shape)
        inputs = words * 32 // bits
        scales = tensors.get(module + ".scales")
        if scales is None:
            raise CheckpointError("a quantized weight has no scales", where=name, expected=module + ".scales", fix="Is a shard missing?")
        groups = scales.shape[0] if scales.shape else 0
        configured = self.settings.get("group_size", 128)
        group = inputs if configured == -1 else configured
        if type(group) is not int or group < 1:
            raise self.refuse("group_size", "-1 or a number of inputs")
        if groups != -(-inputs // group) or inputs % group or outputs * bits % 32:
            raise CheckpointError(
                "a part of a quantized weight has the wrong shape",
                where=module + ".scales",
                got=scales.shape,
                expected=f"one row for every {group} of {inputs} inputs",
            )
        part(tensors, name, module + ".scales", (groups, outputs), ("F16", "BF16", "F32"))
        qzeros = part(tensors, name, module + ".qzeros", (groups, outputs * bits // 32), ("I32",))
        g_idx = part(tensors, name, module + ".g_idx", (inputs,), ("I32",)) if module + ".g_idx" in tensors else None
        if g_idx is None and self.settings.get("desc_act"):
            part(tensors, name, module + ".g_idx", (inputs,), ("I32",))
        shape, symmetric = (outputs, inputs), self.settings.get("sym", True) is True
        in_order = not self.settings.get("desc_act")
        return GptqTensor(name, shape, "gptq", bits, group, symmetric, in_order, scales, info, qzeros, g_idx, self._zero_offset)
