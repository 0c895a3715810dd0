"""The stages of a decoder for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen_export.commands.output import size


def stage_lines(stages: Sequence[Mapping[str, int]]) -> list[str]:
    """A line per stage, none where there is one. `stages`: `first_layer`, `last_layer`, `weight_bytes` and `gpu_bytes` of each."""
    if len(stages) < 2:
        return []
    return [
        f"stage {number}: layers {stage['first_layer']} to {stage['last_layer']}, weights {size(stage['weight_bytes'])}, "
        f"needs {size(stage['gpu_bytes'])} with a full context"
        for number, stage in enumerate(stages)
    ]


def stage_summary(stages: Sequence[Mapping[str, int]]) -> list[str]:
    """The same in one line."""
    most = max((stage["gpu_bytes"] for stage in stages), default=0)
    return [f"in {len(stages)} stages, each on a GPU with at least {size(most)}"] if len(stages) > 1 else []
