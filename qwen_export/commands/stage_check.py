"""Do the stages of a bundle fit on the devices? If not: how many GPUs of what memory are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_export.commands.output import size
from qwen_export.errors import BundleError
from qwen_export.manifest import Manifest
from qwen_export.runtimes.backends.stage_memory import GPU_WORKSPACE, free_on, needed_by_stage
from qwen_export.runtimes.backends.stage_placement import shares, stage_devices
from qwen_export.runtimes.memory.cuda_driver import device_count
from qwen_export.runtimes.memory.device import Device


def check_stages(bundle: Path, manifest: Manifest, devices: Sequence[int]) -> tuple[dict[Device, int], Mapping[Device, int | None]]:
    """What each device needs for its stages, and has free, in bytes; None where that is not known. Raises BundleError where it is too
    little, or where a GPU is not there."""
    on_gpus = manifest.target.device == "cuda"
    by_stage, needs = needed_by_stage(manifest), dict[Device, int]()
    for place, need in zip(stage_devices(manifest, devices), by_stage, strict=True):
        needs[place] = needs.get(place, GPU_WORKSPACE if on_gpus else 0) + need
    present = device_count() if on_gpus else None
    absent = [place for place in needs if present is not None and place.index >= present]
    free = {place: free_on(place) for place in needs if place not in absent}
    short = {place: had for place, had in free.items() if had is not None and had < needs[place]}
    if absent or short:
        raise BundleError(
            "there are too few GPUs for the stages of the bundle"
            if absent
            else "there is too little free memory for the stages of the bundle",
            where=str(bundle),
            got=f"{present}" if absent else ", ".join(f"{size(had)} on {place}" for place, had in short.items()),
            expected=", ".join(f"{size(needs[place])} on {place}" for place in (absent or short)),
            fix=_missing(by_stage, present),
        )
    return needs, free


def _missing(needs: Sequence[int], present: int | None) -> str:
    """What to do where stages that need so many bytes do not fit. `present`: GPUs that are there, None where none are needed."""
    if present is None:
        return "Free memory, or build for GPUs."
    most = max(needs) + GPU_WORKSPACE
    free = [free_on(Device("cuda", number)) or 0 for number in range(present)]
    largest = max(free, default=0)
    if largest < most:
        return f"All {len(needs)} GPUs are missing, with at least {size(most)} free each; or build with more {{stages}} for smaller ones."
    count = next(count for count in range(1, len(needs) + 1) if max(shares(needs, count)) + GPU_WORKSPACE <= largest)
    share = max(shares(needs, count)) + GPU_WORKSPACE
    missing = count - sum(had >= share for had in free)
    if missing > 0:
        return f"{missing} of {count} GPUs are missing, with at least {size(share)} free each; or build with more {{stages}}."
    usable = [number for number, had in enumerate(free) if had >= share][:count]
    return f"Give {{devices}} {','.join(map(str, usable))}."
