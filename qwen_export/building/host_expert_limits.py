"""Which builds can leave routed experts in host memory. Imports no IR: plans are made without it."""

from __future__ import annotations

from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.quantization.precision_plan import PrecisionPlan
from qwen_export.targets import Target


def host_expert_reasons(target: Target, config: TextConfig, plan: PrecisionPlan | None, stages: int | None) -> list[str]:
    """Why a build cannot have them, none where it can."""
    reasons = []
    if target.static:
        reasons.append(f"target {target.name} has no experts in host memory")
    if not config.is_moe:
        reasons.append("the model has no experts that could stay in host memory")
    elif plan is None or plan.groups["experts"].quant is None:
        reasons.append("experts in host memory must be quantized: build in int4 or int8")
    if stages is not None and stages > 1:
        reasons.append(f"experts in host memory are for one GPU, not for {stages} stages")
    return reasons
