"""Can this machine run the bundle? Answered before anything is loaded, in one message."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qwen_export.bundle_contract import RUNTIMES
from qwen_export.element_types import stored_bytes
from qwen_export.errors import BundleError, ParameterError
from qwen_export.manifest import Manifest
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import PROVIDERS, has_provider, installed, version
from qwen_export.runtimes.memory.buffers import ELEMENTS
from qwen_export.runtimes.memory.cuda_driver import memory_info

PORTABLE = "onnx"
_PACKAGES = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu", "dml": "onnxruntime-directml"}


def check_runnable(manifest: Manifest, device_id: int = 0) -> str:
    """Raise BundleError with the exact mismatch: backend, version, execution provider, operator, GPU. Returns what was found."""
    target = manifest.target
    if target.backend not in _CHECKS:
        raise BundleError(
            "the bundle needs another backend than this version has",
            got=target.backend,
            expected=", ".join(_CHECKS),
            fix="Update qwen-export, or build the checkpoint again with this version.",
        )
    types = {tensor.dtype for graph in manifest.graphs.values() for tensor in (*graph.inputs, *graph.outputs)}
    types |= {state.dtype for graph in manifest.graphs.values() for state in graph.states}
    unknown = sorted(types - ELEMENTS.keys())
    if unknown:
        raise BundleError(
            "the bundle's graphs use element types that this version does not know",
            got=", ".join(unknown),
            fix="Update qwen-export, or build the checkpoint again with this version.",
        )
    return _CHECKS[target.backend](manifest, device_id)


def _check_onnxruntime(manifest: Manifest, device_id: int) -> str:
    target = manifest.target
    if target.device not in PROVIDERS:
        raise BundleError(
            "the bundle is compiled for another device than this version knows",
            got=target.device,
            expected=", ".join(PROVIDERS),
            fix="Update qwen-export, or build the checkpoint again with this version.",
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
        raise BundleError("ONNX Runtime is not installed", fix=f"Run pip install {_PACKAGES[target.device]}.")
    if _numbers(have) < _numbers(target.minimum_backend):
        raise BundleError(
            "the installed ONNX Runtime is older than the bundle needs",
            got=have,
            expected=f"at least {target.minimum_backend}",
            fix=f"Run pip install -U {_PACKAGES[target.device]}.",
        )
    if not has_provider(target.device):
        raise BundleError(
            f"the bundle is compiled for {target.device}, and the installed ONNX Runtime {have} has no {PROVIDERS[target.device]}",
            fix=f"Run pip install {_PACKAGES[target.device]}, or build the checkpoint for another {{device}}.",
        )
    found = f"onnxruntime {have} (at least {target.minimum_backend})"
    kernels = installed(target.device)
    if kernels is None:  # builds that do not list their kernels name a missing one when the graph is loaded
        return found
    missing = [name for name in target.operators if not kernels.has(*name.rpartition(".")[::2])]
    if missing:
        raise BundleError(
            f"the installed ONNX Runtime {have} lacks operators of the bundle for {target.device}",
            got=", ".join(missing),
            fix=f"Install {_PACKAGES[target.device]} {target.minimum_backend} or newer.",
        )
    return f"{found}, {len(target.operators)} special operators all present"


def _check_tensorrt(manifest: Manifest, device_id: int) -> str:
    from qwen_export.runtimes.backends.tensorrt.tensorrt_compatibility import check_tensorrt

    return check_tensorrt(manifest, device_id)


def _check_openvino(manifest: Manifest, device_id: int) -> str:
    from qwen_export.runtimes.backends.openvino.openvino_compatibility import check_openvino

    return check_openvino(manifest)


_CHECKS: dict[str, Callable[[Manifest, int], str]] = {
    "onnxruntime": _check_onnxruntime,
    "openvino": _check_openvino,
    "tensorrt": _check_tensorrt,
    "tensorrt-rtx": _check_tensorrt,
}


def this_platform() -> str:
    """System and processor of this machine, "linux x86_64"."""
    machine = platform.machine().lower()
    return f"{platform.system().lower()} {({'amd64': 'x86_64', 'arm64': 'aarch64'}).get(machine, machine)}"


def for_device(manifest: Manifest, device: str | None) -> Manifest:
    """The manifest for another device than the bundle was compiled for; None leaves it. Raises ParameterError for an unknown one."""
    if device is None:
        return manifest
    if device not in PROVIDERS:
        raise ParameterError(
            "the device is not known",
            parameter="device",
            got=device,
            expected=", ".join(PROVIDERS),
            fix="Give one of these, or leave it out.",
        )
    return replace(manifest, target=replace(manifest.target, device=device))


def for_runtime(manifest: Manifest, runtime: str | None) -> Manifest:
    """The manifest for another backend than the bundle was compiled for; None leaves it. Raises ParameterError where the bundle's graphs
    have more than standard operators."""
    if runtime is None or runtime == manifest.target.backend:
        return manifest
    if runtime not in RUNTIMES or manifest.target.name != PORTABLE:
        raise ParameterError(
            "the bundle does not run on this runtime" if runtime in RUNTIMES else "the runtime is not known",
            parameter="runtime",
            got=runtime,
            expected=manifest.target.backend if runtime in RUNTIMES else ", ".join(RUNTIMES),
            fix=f"Leave it out, or build the checkpoint for {{target}} {PORTABLE}.",
        )
    return replace(manifest, target=replace(manifest.target, backend=runtime))


def check_limits(manifest: Manifest, max_context: int | None = None, threads: int | None = None) -> None:
    """Raise ParameterError for a context or a number of threads that this machine cannot serve, before anything is allocated."""
    most = max(64, 4 * (os.cpu_count() or 1))
    if threads is not None and not 1 <= threads <= most:
        raise ParameterError(
            "the number of threads is out of range", parameter="threads", got=threads, expected=f"1 to {most}", fix="Give fewer {threads}."
        )
    if max_context is not None and max_context < 1:
        raise ParameterError(
            "the context is out of range", parameter="max_context", got=max_context, expected="at least 1 token", fix="Raise {max_context}."
        )
    if manifest.target.device != "cpu" or manifest.target.backend not in RUNTIMES:
        return
    context = min(max_context or manifest.max_context, manifest.model["max_position_embeddings"])
    need, have = state_bytes(manifest, context), psutil_memory().total
    if need > have:
        raise ParameterError(
            "the states and caches of the context do not fit into the memory of this machine",
            parameter="max_context",
            got=f"{context} tokens, {need / 2**30:.1f} GiB",
            expected=f"at most {have / 2**30:.1f} GiB",
            fix="Lower {max_context}.",
        )


def needed_memory(manifest: Manifest) -> int:
    """Bytes of graphs, weights and, with a full context, of states and caches."""
    stored: dict[tuple[str, int], int] = {}
    for graph in manifest.graphs.values():
        for weight in graph.weights:  # graphs share weights; some are the front of others
            place = weight.file, weight.offset
            stored[place] = max(stored.get(place, 0), stored_bytes(weight.dtype, weight.shape))
    # Engines with weights inside need no file of them, which a bundle may carry for building them again.
    inside = manifest.engine is not None and manifest.engine.weights == "embedded"
    graphs = sum(manifest.files[name].size for name in {graph.file for graph in manifest.graphs.values()})
    return graphs + (0 if inside else sum(stored.values())) + state_bytes(manifest, manifest.max_context)


def state_bytes(manifest: Manifest, context: int, *, drafts: bool = True) -> int:
    """Bytes of the states and caches of one sequence of `context` tokens, with `drafts` those of the draft head, too. Pending inputs have
    two sets of buffers, and so have states that some graph does not write in place."""
    pending = 1 + (manifest.speculation.max_draft if manifest.speculation else 0)
    dims = {"B": 1, "S": context, "P": pending, "T": pending, "N": 1}
    states: dict[tuple[bool, str], int] = {}
    for name, graph in manifest.graphs.items():
        for state in graph.states if drafts or not name.startswith("mtp") else ():
            key = name.startswith("mtp"), state.name
            size = stored_bytes(state.dtype, [d if isinstance(d, int) else dims[d] for d in state.shape])
            states[key] = max(states.get(key, 0), size * (2 if state.pending or not state.in_place else 1))
    return sum(states.values())


def free_memory(manifest: Manifest) -> int | None:
    """Bytes that are free where the bundle's weights and states will be; None where that is not known."""
    if manifest.target.backend not in RUNTIMES:
        return memory_info()[0]
    return int(psutil_memory().available) if manifest.target.device == "cpu" else None


def psutil_memory() -> Any:
    """Memory of this machine: `available` and `total`, in bytes."""
    import psutil

    return psutil.virtual_memory()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
