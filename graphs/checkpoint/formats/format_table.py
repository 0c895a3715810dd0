"""All quantization methods that are read, by the `quant_method` of config.json, and the view of a checkpoint that they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_export.errors import CheckpointError, UnsupportedError
from qwen_export.graphs.checkpoint.formats.auto_round import AutoRound
from qwen_export.graphs.checkpoint.formats.awq import Awq
from qwen_export.graphs.checkpoint.formats.block_fp8 import BlockFp8
from qwen_export.graphs.checkpoint.formats.compressed_tensors import CompressedTensors
from qwen_export.graphs.checkpoint.formats.gptq import Gptq
from qwen_export.graphs.checkpoint.formats.logical_tensor import LogicalTensor, Tensors
from qwen_export.graphs.checkpoint.formats.modelopt import ModelOpt
from qwen_export.graphs.checkpoint.formats.plain_tensor import plain
from qwen_export.graphs.checkpoint.formats.storage_format import OTHER_RELEASE, Format
from qwen_export.graphs.config_fields import shown

FORMATS: dict[str, type[Format]] = {form.method: form for form in (BlockFp8, Gptq, Awq, AutoRound, CompressedTensors, ModelOpt)}
# Older names of methods.
_ALIASES = {"auto_round": "auto-round", "intel/auto-round": "auto-round", "autoround": "auto-round", "fbgemm_fp8": "fp8"}


def format_of(quantization: Mapping[str, Any]) -> Format:
    """The method that quantization_config names. Raises UnsupportedError for one that is not implemented."""
    method = quantization.get("quant_method", "nothing")
    name = _ALIASES.get(method, method) if isinstance(method, str) else ""
    if name not in FORMATS:
        raise UnsupportedError(
            "this quantization method is not supported",
            where="quantization_config 'quant_method'",
            got=shown(method),
            expected=", ".join(FORMATS),
            fix=OTHER_RELEASE,
        )
    return FORMATS[name](quantization)


def logical_weights(tensors: Tensors, quantization: Mapping[str, Any] | None) -> dict[str, LogicalTensor]:
    """Every weight under its plain name, in the order of the files."""
    if not quantization:
        return {name: plain(info) for name, info in tensors.items()}
    form = format_of(quantization)
    weights: dict[str, LogicalTensor] = {}
    used: set[str] = set()
    for info in tensors.values():
        weight = form.weight(info, tensors)
        if weight is not None:
            if weight.name in weights or (weight.name in tensors and weight.name != info.name):
                raise CheckpointError(
                    "a tensor is stored twice", where=weight.name, got="plain and quantized", fix="Keep one copy of the weight."
                )
            weights[weight.name] = weight
            used.update(part.name for part in weight.parts)
    for name, info in tensors.items():
        if name in used or name.endswith(form.activation_suffixes):
            continue
        if name.endswith(form.part_suffixes):
            if name.endswith(".weight_shape"):
                continue  # read by the packed weight
            raise CheckpointError("a part of a quantized weight is stored without its other parts", where=name, fix="Is a shard missing?")
        weights[name] = plain(info)
    return weights


def storage_summary(weights: Mapping[str, LogicalTensor]) -> dict[str, int]:
    """How many weights are stored in each form, most frequent first."""
    counts: dict[str, int] = {}
    for weight in weights.values():
        counts[weight.storage] = counts.get(weight.storage, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
