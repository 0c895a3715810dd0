"""Options of `load` that depend on what the bundle has."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_export.errors import ParameterError
from qwen_export.manifest import Manifest
from qwen_export.runtimes.backends.expert_placement import binds_weights
from qwen_export.runtimes.decoding.static_graphs import HEAD_STEP, STEP
from qwen_export.stages import stage_groups


def check_speculate(value: str | int, manifest: Manifest) -> None:
    longest = manifest.speculation.max_draft if manifest.speculation else 0
    if isinstance(value, int) and HEAD_STEP not in manifest.graphs:
        longest = 0
    if isinstance(value, int) and not 1 <= value <= longest:
        raise ParameterError(
            "the bundle cannot draft that many tokens" if longest else "the bundle was built without a draft head",
            parameter="speculate",
            got=value,
            expected=f"1 to {longest}, auto or off" if longest else "auto or off",
            fix="Choose one of these." if longest else "Build it again with {mtp}, from a checkpoint that has mtp.* tensors.",
        )
    if isinstance(value, str) and value not in ("auto", "off", "lookup"):
        raise ParameterError(
            "the way to speculate is not known",
            parameter="speculate",
            got=value,
            expected="auto, off, lookup or a number",
            fix="Choose one of these.",
        )
    if value == "lookup" and not longest:
        raise ParameterError(
            "the bundle was built without speculation", parameter="speculate", got="lookup", fix="Build it again with {lookup}."
        )


def check_weight_budget(value: int | None, manifest: Manifest) -> None:
    streams = manifest.engine is not None and manifest.engine.options.get("weight_streaming")
    streams = streams or (manifest.target.device == "cuda" and binds_weights(manifest))
    if value is not None and value < 0:
        raise ParameterError(
            "the memory for weights is negative",
            parameter="weight_budget",
            got=value,
            expected="at least 0 bytes",
            fix="Raise {weight_budget}.",
        )
    if value is not None and not streams:
        raise ParameterError(
            "the bundle's weights cannot wait in host memory",
            parameter="weight_budget",
            fix="Build it for {device} cuda with {host_experts}, or for TensorRT with {weight_streaming} and embedded {engine_weights}.",
        )


def check_devices(devices: Sequence[int], manifest: Manifest) -> None:
    """Several devices are for a bundle with stages, at most one device each."""
    stages = len(stage_groups(manifest.graphs).get(STEP, ()))
    if len(devices) > stages or len(set(devices)) < len(devices):
        raise ParameterError(
            "the bundle cannot be spread over these devices",
            parameter="devices",
            got=", ".join(map(str, devices)),
            expected=f"at most {stages} different ones, as many as the bundle has stages",
            fix="Build it again with more {stages}, or give fewer {devices}.",
        )
