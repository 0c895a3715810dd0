"""The graphs that TensorRT compiles, as a bundle that ONNX Runtime runs on the CPU: they are standard ONNX, so their numbers can be proven
without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_export.emission import write_files, write_manifest
from qwen_export.graphs.checkpoint.directory import open_checkpoint
from qwen_export.lowering import lower
from qwen_export.plan import plan_build
from qwen_export.staging import staged_directory
from qwen_export.static_plan import StaticOptions


def bundle_on_cpu(checkpoint: Path, output: Path, precision: str = "fp32", options: StaticOptions | None = None, **wishes: Any) -> Path:
    """Lower as for `--target tensorrt-rtx`, and leave the graphs ONNX. The LM head's top-k outputs stay."""
    source = open_checkpoint(checkpoint)
    plan = plan_build(source, "tensorrt-rtx", "cuda", precision, options=options, **wishes)
    on_cpu = replace(
        plan, engine=None, device="cpu", target=replace(plan.target, backend="onnxruntime", minimum_backend="1.31.0", engines=False)
    )
    with staged_directory(output, replace=True, keep=()) as staging:
        models = lower(source, plan)
        files = write_files(source, on_cpu, models, staging, lambda *_: None, None, None)
        write_manifest(source, on_cpu, models, files, {}, staging)
    return output
