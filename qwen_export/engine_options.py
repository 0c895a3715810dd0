"""How engines of TensorRT are compiled. Imports nothing of it: plans and the command line use this."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BOUND, EMBEDDED, STRIPPED = "bound", "embedded", "stripped"
ENGINE_WEIGHTS = {
    BOUND: "inputs of the engine, which all engines of a bundle share",
    EMBEDDED: "in every engine",
    STRIPPED: "given to the engine when it is loaded (refit)",
}
HARDWARE_COMPATIBILITY = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-sm": "SAME_COMPUTE_CAPABILITY"}
"""Values of --hardware-compat, as names of tensorrt.HardwareCompatibilityLevel."""
TILING = {"none": "NONE", "fast": "FAST", "moderate": "MODERATE", "full": "FULL"}
"""Values of --tiling-level, as names of tensorrt.TilingOptimizationLevel."""

PLUGINS = ("gated_delta_net",)
"""Values of --plugin."""


@dataclass(frozen=True)
class EngineOptions:
    """How to compile. `sms`: compute capabilities like "89"; none means the GPU that is there. `weights`: see ENGINE_WEIGHTS. `workspace`
    in bytes. `aux_streams`: how many streams besides the first one a call may use, None for TensorRT's choice. `tiling`: see TILING.
    `tf32`: fp32 products may round their operands to 10 bits. `layer_dump`: a directory for a file per graph with its layers.
    `carry_onnx`: the bundle gets the graphs as TensorRT reads them, for `qwen-export rebuild`. `plugins`: ops, among PLUGINS, that get a
    kernel of ours instead of native layers."""

    sms: tuple[str, ...] = ()
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    opt_level: int | None = None
    workspace: int | None = None
    aux_streams: int | None = None
    tiling: str = "none"
    timing_cache: Path | None = None
    weight_streaming: bool = False
    weights: str = BOUND
    tf32: bool = False
    layer_dump: Path | None = None
    carry_onnx: bool = False
    plugins: tuple[str, ...] = ()
