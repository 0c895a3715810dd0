"""GPTQ: `X.qweight` i32[I*bits/32, O], codes packed along I, lowest bits first; `X.scales` f16[G, O]; `X.qzeros` i32[G, O*bits/32], packed
along O; `X.g_idx` i32[I], the group of each input.

`checkpoint_format` "gptq" stores zero points less one (in arithmetic of `bits` bits), "gptq_v2" as they are. With `desc_act` inputs were
quantized in another order, so that the inputs of a group are not neighbors: such a weight has no grid along its rows.

Bits and group of a module follow from the shapes: O from qweight, bits from qzeros, G from scales. `dynamic` (GPTQModel) overrides the
other settings for the modules whose name a pattern matches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.integer_codes import Bytes, IntegerTensor, unpack, zeros_of
from qwen_export.graphs.checkpoint.formats.logical_tensor import (
    FLOAT_SCALES,
    Floats,
    GridRows,
    LogicalTensor,
    Parts,
    Tensors,
    checked_scales,
    part,
    scales_of,
)
from qwen_export.graphs.checkpoint.formats.storage_format import (
    Format,
    group_of_parts,
    matches,
    module_names,
    refuse_module,
    unpacked_sizes,
)
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

    def codes(self, parts: Parts, start: int, stop: int) -> GridRows | None:
        order = self._groups(parts)
        if (order != np.arange(len(order)) // self.group).any():
            return None
        zeros = zeros_of(self, self._zeros(parts, start, stop))
        return GridRows(self._matrix(parts, start, stop), self._scales(parts, start, stop), zeros, self.group, self.bits)

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
                "g_idx names a group that has no scales",
                where=self.g_idx.name,
                got=f"{order.min()}..{order.max()}",
                expected=f"0..{count - 1}",
                fix="Copy or download the checkpoint again.",
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
        # v2 is written as a format of its own; kernels' own layouts (marlin, exllama) are not checkpoints to exchange.
        layout = settings.get("checkpoint_format") or settings.get("format")
        if layout not in (None, "gptq", "gptq_v2"):
            raise self.refuse("checkpoint_format", "'gptq' or 'gptq_v2'")
        self._zero_offset = 0 if layout == "gptq_v2" else 1
        self._dynamic = settings.get("dynamic") or {}
        if not isinstance(self._dynamic, dict):
            raise self.refuse("dynamic", "settings by pattern of module names")

    def weight(self, info: TensorInfo, tensors: Tensors) -> LogicalTensor | None:
        if not info.name.endswith(".qweight"):
            return None
        module = info.name.removesuffix(".qweight")
        return gptq_tensor(self.method, info, tensors, self._settings_of(info, module), self._zero_offset)

    def _settings_of(self, info: TensorInfo, module: str) -> Mapping[str, Any]:
        """The settings of one module: the first pattern that matches overrides. `-:` marks modules that are not quantized."""
        for pattern, overrides in self._dynamic.items():
            if any(matches(pattern.removeprefix("+:").removeprefix("-:"), name) for name in module_names(info, module)):
                return {**self.settings, **overrides} if isinstance(overrides, dict) and not pattern.startswith("-:") else self.settings
        return self.settings


def gptq_tensor(method: str, info: TensorInfo, tensors: Tensors, settings: Mapping[str, Any], zero_offset: int) -> GptqTensor:
    """The weight whose codes are `info`, an `X.qweight`. `settings` are those of its module: `sym`, `desc_act`."""
    module = info.name.removesuffix(".qweight")
    name = module + ".weight"
    words, outputs = unpacked_sizes(info.name, info.shape)
    part(tensors, name, info.name, info.shape, ("I32",))
    scales, zeros = scales_of(tensors, name, module + ".scales"), scales_of(tensors, name, module + ".qzeros")
    groups = scales.shape[0] if len(scales.shape) == 2 else 0
    wide = zeros.shape[1] * 32 if len(zeros.shape) == 2 else 0
    bits = wide // outputs if wide % outputs == 0 else 0
    if bits not in (4, 8):
        found = f"{bits} bits" if bits else f"zero points {zeros.shape} for {outputs} outputs"
        raise refuse_module(method, name, found, "4 or 8 bits, and a multiple of 32 bits of outputs")
    inputs = words * 32 // bits
    group = group_of_parts(method, name, inputs, groups, settings.get("group_size", settings.get("q_group_size")))
    part(tensors, name, module + ".scales", (groups, outputs), FLOAT_SCALES)
    qzeros = part(tensors, name, module + ".qzeros", (groups, outputs * bits // 32), ("I32",))
    desc_act = bool(settings.get("desc_act"))
    g_idx = part(tensors, name, module + ".g_idx", (inputs,), ("I32",)) if module + ".g_idx" in tensors or desc_act else None
    symmetric = settings.get("sym", True) is True
    return GptqTensor(name, (outputs, inputs), method, bits, group, symmetric, not desc_act, scales, info, qzeros, g_idx, zero_offset)
