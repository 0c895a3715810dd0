"""What a checkpoint is and what each target can do with it, from headers alone. Imports neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from qwen_export.building.build_plan import BuildPlan, plan_build
from qwen_export.building.stage_plan import present_memory
from qwen_export.engine_options import EngineOptions
from qwen_export.errors import QwenExportError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint, open_checkpoint
from qwen_export.graphs.checkpoint.formats.format_table import storage_summary
from qwen_export.graphs.checkpoint.formats.logical_tensor import LogicalTensor
from qwen_export.graphs.checkpoint.formats.plain_tensor import plain
from qwen_export.graphs.checkpoint.stored_prefixes import MTP_PREFIX, VISION_PREFIX
from qwen_export.graphs.checkpoint.tensor_names import decoder_tensors
from qwen_export.graphs.config import FULL, TextConfig
from qwen_export.graphs.quantization.precision_plan import INT4
from qwen_export.graphs.rope_config import RopeConfig
from qwen_export.targets import TARGETS, Target


def inspect_checkpoint(
    path: str | Path,
    rope_scaling: str | None = None,
    targets: Collection[str] = (),
    sms: tuple[str, ...] = (),
    calibrate: str | None = None,
    device_memory: int | None = None,
) -> dict[str, Any]:
    """A JSON-able report: `model` (with the decoder's parameters, and those that one token uses), `parts` (parameters and bytes of text,
    mtp, vision), `quantization`, and per target, device and precision whether it is supported, why not, and the estimated bytes of the
    bundle and of a run, and whether it would have a draft head and read pictures, or why not. `rope_scaling` as in `build`;
    `targets`: only these, if any; `sms`: the compute capabilities that engines would be for; `calibrate`: as in `build`, for int4;
    `device_memory`: as in `build`, for the number of stages."""
    checkpoint = open_checkpoint(path, rope_scaling)
    text = checkpoint.config.text
    parameters = sum(prod(shape) for _, shape in decoder_tensors(text))
    return {
        "path": str(checkpoint.path),
        "architecture": checkpoint.config.architecture,
        "model": {
            "type": text.model_type,
            "kind": "mixture of experts" if text.is_moe else "dense",
            "layers": text.num_layers,
            "attention_layers": sum(kind == FULL for kind in text.layer_types),
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
            "max_context": text.max_position_embeddings,
            "tied_head": text.tie_word_embeddings,
            "experts": text.num_experts,
            "experts_per_token": text.num_experts_per_tok,
            "parameters": parameters,
            "active_parameters": parameters - idle_parameters(text),
            "rope": rope_summary(text.rope),
        },
        "parts": _parts(checkpoint),
        "quantization": _quantization(checkpoint),
        "notes": list(checkpoint.notes),
        "bytes": checkpoint.nbytes,
        "files": len({tensor.file for tensor in checkpoint.tensors.values()}),
        "targets": list(
            _targets(
                checkpoint, [TARGETS[name] for name in targets or TARGETS], EngineOptions(sms), calibrate, device_memory or present_memory()
            )
        ),
    }


def rope_summary(rope: RopeConfig) -> str:
    """`default`, or `yarn x4 of 262144`."""
    return rope.kind if rope.kind == "default" else f"{rope.kind} x{rope.factor:g} of {rope.original_max_position_embeddings}"


def idle_parameters(text: TextConfig) -> int:
    """Parameters of the decoder that one token leaves alone: those of the experts that the router does not select."""
    return text.num_layers * (text.num_experts - text.num_experts_per_tok) * 3 * text.hidden_size * text.moe_intermediate_size


def _parts(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    parts: dict[str, dict[str, int]] = {}
    for name, weight in _weights(checkpoint).items():
        part = "mtp" if name.startswith(MTP_PREFIX) else "vision" if name.startswith(VISION_PREFIX) else "text"
        entry = parts.setdefault(part, {"tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += len(weight.parts)
        entry["parameters"] += prod(weight.shape)
        entry["bytes"] += weight.nbytes
    return parts


def _quantization(checkpoint: Checkpoint) -> str:
    """The method, and in how many forms the weights are stored: `gptq (136 gptq int4 g128, 184 bf16)`."""
    if not checkpoint.config.quantization:
        return "none"
    forms = ", ".join(f"{count} {form}" for form, count in storage_summary(_weights(checkpoint)).items())
    return f"{checkpoint.config.quantization.get('quant_method', 'unknown')} ({forms})"


def _weights(checkpoint: Checkpoint) -> Mapping[str, LogicalTensor]:
    """The weights; the stored tensors as they are where the quantization cannot be read: the targets' lines say why."""
    try:
        return checkpoint.weights
    except QwenExportError:
        return {name: plain(info) for name, info in checkpoint.tensors.items()}


def _becomes(plan: BuildPlan) -> dict[str, int]:
    """What becomes of the matrices that the checkpoint stores quantized, and of how many."""
    total: dict[str, int] = {}
    for counts in plan.quantization.outcome.values() if plan.quantization else ():
        for what, count in counts.items():
            total[what] = total.get(what, 0) + count
    return total


def why_not(error: QwenExportError) -> str:
    """The reasons of a plan that was refused, which are in `got`; the whole message of any other error."""
    return error.got if isinstance(error, UnsupportedError) and error.got else str(error)


def _targets(
    checkpoint: Checkpoint, targets: Iterable[Target], engine: EngineOptions, calibrate: str | None, device_memory: int | None
) -> Iterator[dict[str, Any]]:
    for target in targets:
        for device in target.devices:
            for precision in target.precisions:
                entry: dict[str, Any] = {"target": target.name, "device": device, "precision": precision}
                text = calibrate if precision == INT4 else None
                try:
                    plan = plan_build(
                        checkpoint, target.name, device, precision, engine=engine, calibrate=text, device_memory=device_memory
                    )
                except QwenExportError as error:
                    yield entry | {"supported": False, "why": why_not(error)}
                else:
                    lowerings = {op: choice.name for op, choice in plan.choices.items()}
                    yield entry | {
                        "supported": True,
                        "bundle_bytes": plan.bundle_bytes,
                        "run_bytes": plan.run_bytes,
                        "max_context": plan.max_context,
                        "lowerings": lowerings,
                        "draft_head": not plan.no_head,
                        "no_draft_head": plan.no_head,
                        "pictures": plan.vision.spec is not None,
                        "no_pictures": plan.vision.reason,
                        "quantized_matrices": _becomes(plan),
                        "calibration": plan.calibration.note if plan.calibration else "",
                        "stages": [stage.facts for stage in plan.stages],
                    }
