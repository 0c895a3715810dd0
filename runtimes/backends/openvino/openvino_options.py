"""The properties that graphs are compiled with."""

from __future__ import annotations

from typing import Any

from qwen_export.manifest import Manifest


def openvino_options(manifest: Manifest, threads: int | None) -> dict[str, Any]:
    """`threads`: None for one per physical core."""
    # OpenVINO's default is bf16 where the processor has it, which has fewer bits than what the bundle was built with.
    half = manifest.target.precision == "fp16" and "FP16" in _capabilities()
    return {
        # A call at a time, with all threads: graphs of a bundle take turns.
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": "f16" if half else "f32",
    } | ({"INFERENCE_NUM_THREADS": threads} if threads else {})


def _capabilities() -> list[str]:
    """Element types that the processor multiplies."""
    import openvino

    return list(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
