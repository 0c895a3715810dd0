"""Can this machine run the bundle? Answered before anything is loaded, in one sentence."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from math import prod
from pathlib import Path

from qwen_export.errors import BundleError
from qwen_export.manifest import Manifest
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import PROVIDERS, has_provider, installed, version
from qwen_export.runtimes.memory.buffers import ELEMENTS
from qwen_export.runtimes.memory.cuda_driver import memory_info
from qwen_export.runtimes.memory.mapped_weights import weight_bytes


def check_runnable(manifest: Manifest, device_id: int = 0) -> str:
    """Raise BundleError with the exact mismatch: backend, version, execution provider, operator, GPU. Returns what was found."""
    target = manifest.target
    if target.backend not in _CHECKS:
        raise BundleError("the bundle needs another backend than this version has", got=target.backend, expected=", ".join(_CHECKS))
    types = {tensor.dtype for graph in manifest.graphs.values() for tensor in (*graph.inputs, *graph.outputs)}
    types |= {state.dtype for graph in manifest.graphs.values() for state in graph.states}
    unknown = sorted(types - ELEMENTS.keys())
    if unknown:
        raise BundleError("the bundle's graphs use element types that this version does not know", got=", ".join(unknown))
    return _CHECKS[target.backend](manifest, device_id)


def _check_onnxruntime(manifest: Manifest, device_id: int) -> str:
    target = manifest.target
    if target.device not in PROVIDERS:
        raise BundleError(
            "the bundle is compiled for another device than this version knows", got=target.device, expected=", ".join(PROVIDERS)
        )
    if manifest.plugins and target.platform not in ("", this_platform()):
        raise BundleError(
            "the bundle has kernels that are compiled for another kind of machine",
            got=this_platform(),
            expected=target.platform,
            fix="Build the checkpoint on a machine like this one, or without the plugin.",
        )
    have = version()
    if not have:
        extra = "onnxruntime-gpu" if target.device == "cuda" else "onnxruntime"
        raise BundleError("ONNX Runtime is not installed", fix=f"pip install 'qwen-export[{extra}]'.")
    if _numbers(have) < _numbers(target.minimum_backend):
        raise BundleError(
            "the installed ONNX Runtime is older than the bundle needs",
            got=have,
            expected=f"at least {target.minimum_backend}",
            fix="pip install -U onnxruntime.",
        )
    if not has_provider(target.device):
        raise BundleError(
            f"the bundle is compiled for {target.device}, and the installed ONNX Runtime {have} has no {PROVIDERS[target.device]}",
            fix="pip install onnxruntime-gpu, or build the checkpoint with --device cpu.",
        )
    found = f"onnxruntime {have} (at least {target.minimum_backend})"
    kernels = installed(target.device)
    if kernels is None:  # builds that do not tell their kernels name a missing one when the graph is loaded
        return found
    missing = [name for name in target.operators if not kernels.has(*name.rpartition(".")[::2])]
    if missing:
        raise BundleError(
            f"the installed ONNX Runtime {have} lacks operators of the bundle for {target.device}",
            got=", ".join(missing),
            fix=f"Install onnxruntime {target.minimum_backend} or newer.",
        )
    return f"{found}, {len(target.operators)} special operators all present"


def _check_tensorrt(manifest: Manifest, device_id: int) -> str:
    from qwen_export.runtimes.backends.tensorrt.tensorrt_compatibility import check_tensorrt

    return check_tensorrt(manifest, device_id)


_CHECKS: dict[str, Callable[[Manifest, int], str]] = {
    "onnxruntime": _check_onnxruntime,
    "tensorrt": _check_tensorrt,
    "tensorrt-rtx": _check_tensorrt,
}


def this_platform() -> str:
    """System and processor of this machine, "linux x86_64"."""
    machine = platform.machine().lower()
    return f"{platform.system().lower()} {({'amd64': 'x86_64', 'arm64': 'aarch64'}).get(machine, machine)}"


def needed_memory(manifest: Manifest, bundle: Path) -> int:
    """Bytes of weights and, with a full context, of states and caches."""
    graphs = sum((bundle / name).stat().st_size for name in manifest.files)
    outside = {(w.file, w.offset): w for graph in manifest.graphs.values() for w in graph.weights if w.file in manifest.references}
    graphs += sum(weight_bytes(weight) for weight in outside.values())
    # Pending inputs have two sets of buffers, and so have states that no graph writes in place.
    dims = {"B": 1, "S": manifest.max_context, "P": 2 * (manifest.speculation.max_draft + 1 if manifest.speculation else 1)}
    states: dict[tuple[bool, str], int] = {}
    for name, graph in manifest.graphs.items():
        for state in graph.states:
            size = ELEMENTS[state.dtype][0] * prod(d if isinstance(d, int) else dims[d] for d in state.shape)
            states[name.startswith("mtp"), state.name] = size if state.in_place else 2 * size
    return graphs + sum(states.values())


def free_memory(manifest: Manifest) -> int | None:
    """Bytes that are free where the bundle's weights and states will lie; None where that is not known."""
    if manifest.target.backend != "onnxruntime":
        return memory_info()[0]
    return available_memory() if manifest.target.device == "cpu" else None


def available_memory() -> int | None:
    """Bytes of free host memory, None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return None
    except OSError:
        names = getattr(os, "sysconf_names", {})
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
