"""AutoRound's own format. The parts that are stored for a module decide its form; `packing_format` has the packing of integers.

auto_round:auto_gptq              the layout of GPTQ, zero points less one
auto_round, auto_round:exllamav2  the layout of GPTQ, zero points as they are
auto_round:auto_awq               the layout of AWQ
fp8, auto_round:fp8_static        X.weight f8[O, I], X.weight_scale flat: [1], [O] or [O*G]
auto_round:llm_compressor         NVFP4, MXFP4 and MXFP8 as compressed-tensors has them

`extra_config` has the settings of single modules, by name or pattern. Modules of 16 bits are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_export.graphs.checkpoint.formats.awq import awq_tensor
from qwen_export.graphs.checkpoint.formats.fp4 import fp4_tensor
from qwen_export.graphs.checkpoint.formats.gptq import gptq_tensor
from qwen_export.graphs.checkpoint.formats.logical_tensor import LogicalTensor, Tensors
from qwen_export.graphs.checkpoint.formats.scaled_values import scaled_tensor
from qwen_export.graphs.checkpoint.formats.storage_format import Format, matches, module_names, refuse_module
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo

_GPTQ, _PLAIN, _AWQ = "auto_round:auto_gptq", "auto_round", "auto_round:auto_awq"
_PACKINGS = (
    *(_GPTQ, "auto_round:auto_gptq:exllamav2", "auto_round:gptq", _PLAIN, "auto_round:exllamav2", "auto_round:tritonv2"),
    *(_AWQ, "auto_round:awq", "auto_round:fp8", "auto_round:fp8_static", "auto_round:llm_compressor"),
)


class AutoRound(Format):
    method = "auto-round"
    part_suffixes = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale", ".weight_global_scale", ".weight_zp")
    activation_suffixes = (".input_scale", ".input_global_scale", ".act_scale", ".k_scale", ".v_scale")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        packing = settings.get("packing_format") or _GPTQ
        if packing not in _PACKINGS:
            raise self.refuse("packing_format", ", ".join(_PACKINGS))
        self._packing = str(packing)
        extra = settings.get("extra_config") or {}
        if not isinstance(extra, dict):
            raise self.refuse("extra_config", "settings by name of the module")
        self._extra = extra

    def weight(self, info: TensorInfo, tensors: Tensors) -> LogicalTensor | None:
        if info.name.endswith(".qweight"):
            settings = self._settings_of(info, info.name.removesuffix(".qweight"))
            if "awq" in self._packing:
                return awq_tensor(self.method, info, tensors, settings)
            return gptq_tensor(self.method, info, tensors, settings, 1 if "gptq" in self._packing else 0)
        if info.name.endswith(".weight_packed"):
            weight = info.name.removesuffix("_packed")
            return fp4_tensor(tensors, info, weight, weight + "_scale", weight + "_global_scale", divides=True)
        if info.name.endswith(".weight") and info.dtype == "F8_E4M3":
            if info.name.removesuffix("weight") + "weight_zp" in tensors:
                raise refuse_module(self.method, info.name, "fp8 with zero points", "symmetric fp8 weights")
            return scaled_tensor(tensors, info, info.name + "_scale")
        return None

    def _settings_of(self, info: TensorInfo, module: str) -> Mapping[str, Any]:
        """The settings of one module: those that name it, else those whose pattern matches its whole name."""
        names = list(module_names(info, module))
        named = next((self._extra[name] for name in names if name in self._extra), None)
        if named is None:
            patterns = (extra for key, extra in self._extra.items() if any(matches(key, name, whole=True) for name in names))
            named = next(patterns, None)
        return {**self.settings, **named} if isinstance(named, dict) else self.settings
