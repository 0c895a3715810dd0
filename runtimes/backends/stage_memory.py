"""What each stage of a bundle takes, and what a device has."""

from __future__ import annotations

from dataclasses import replace

from qwen_export.bundle_contract import STEP
from qwen_export.errors import BundleError
from qwen_export.manifest import Manifest
from qwen_export.runtimes.backends.compatibility import needed_memory, psutil_memory
from qwen_export.runtimes.memory.cuda_driver import memory_info, use_device
from qwen_export.runtimes.memory.device import Device
from qwen_export.stages import stage_groups

GPU_WORKSPACE = 1 << 30
"""What a GPU needs besides weights and caches, an estimate: the context of CUDA, libraries, and activations of a piece of a prompt."""


def needed_by_stage(manifest: Manifest) -> list[int]:
    """Bytes of each stage with a full context; the last has the other graphs, too."""
    names = stage_groups(manifest.graphs)[STEP]
    graphs = [{name: manifest.graphs[name]} for name in names]
    graphs[-1] |= {name: graph for name, graph in manifest.graphs.items() if name not in names}
    return [needed_memory(replace(manifest, graphs=one)) for one in graphs]


def free_on(device: Device) -> int | None:
    """Bytes that are free on a device; None where that is not known. Raises BundleError for a GPU that is not there."""
    if device.is_host:
        return int(psutil_memory().available)
    if device.kind != "cuda":
        return None
    try:
        use_device(device.index)
    except BundleError as error:
        error.fix = "Give the numbers of GPUs that this machine has, or build with as many {stages} as it has GPUs."
        raise
    return memory_info()[0]
