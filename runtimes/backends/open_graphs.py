"""The backends: how the graphs of a bundle become sessions (`session.py`). The manifest names the one that a bundle is for."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_export.manifest import Manifest, file_path
from qwen_export.runtimes.backends.expert_placement import binds_weights, experts_on_host
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.backends.stage_placement import graph_devices
from qwen_export.runtimes.backends.staged_session import StagedSession
from qwen_export.runtimes.memory.bound_weights import BoundWeights
from qwen_export.runtimes.memory.device import Device
from qwen_export.runtimes.memory.mapped_weights import MappedWeights
from qwen_export.stages import stage_groups

if TYPE_CHECKING:
    from qwen_export.runtimes.backends.onnxruntime.onnxruntime_library import OnnxRuntimeLibrary

Sessions = Callable[[str], Session]
"""Opens the graph of a name. Sessions of one bundle share its weights."""


@dataclass(frozen=True)
class OpenOptions:
    """`threads`, `repack` and `packed_once` are for ONNX Runtime on the CPU: with the last, graphs of static shapes share what they make of
    the weights, where the installed ONNX Runtime can. `device_id` is the number of the GPU, `device_ids` those for the stages of a bundle
    that has several. `graphs`: their directory, if not in the bundle. `later`: graphs that need not be open before they are called.
    `weight_budget`: bytes on the GPU for weights of engines that can leave them in host memory, None for all, and for weights of a bundle
    whose experts can stay there, None for what is free beside a context of `context` tokens, by default the bundle's."""

    threads: int | None = None
    repack: bool = False
    device_id: int = 0
    device_ids: tuple[int, ...] = ()
    graphs: Path | None = None
    later: Collection[str] = ()
    weight_budget: int | None = None
    packed_once: bool = False
    context: int | None = None


def _onnxruntime(bundle: Path, manifest: Manifest, options: OpenOptions) -> Sessions:
    from qwen_export.runtimes.backends.onnxruntime.onnxruntime_session import OnnxRuntimeSession
    from qwen_export.runtimes.backends.onnxruntime.packed_once_session import PackedOnceSession, PackedWeights

    plugins = [file_path(bundle, name) for name in manifest.plugins]
    weights, devices = MappedWeights(bundle, manifest), graph_devices(manifest, options.device_ids or (options.device_id,))

    bound = _bound_weights(manifest, options, weights)
    library = _packing_library(manifest, options)
    packed = PackedWeights(library, weights) if library is not None else None

    def session(name: str) -> Session:
        graph, device = manifest.graphs[name], devices[name]
        path, folder = file_path(options.graphs or bundle, graph.file), bundle if options.graphs is not None else None
        later = name in options.later
        if packed is not None:
            return PackedOnceSession(path, graph, options.threads, packed, folder=folder, later=later)
        return OnnxRuntimeSession(
            path,
            graph,
            device,
            options.threads,
            plugins,
            weights=weights,
            bound=bound,
            repack=options.repack,
            folder=folder,
            later=later,
        )

    return session


def _bound_weights(manifest: Manifest, options: OpenOptions, weights: MappedWeights) -> BoundWeights | None:
    """The weights that are inputs of graphs, None where there are none."""
    if not binds_weights(manifest):
        return None
    device = Device(manifest.target.device, (options.device_ids or (options.device_id,))[-1])
    context = options.context or manifest.max_context
    return BoundWeights(weights, device, experts_on_host(manifest, device, options.weight_budget, context))


def _packing_library(manifest: Manifest, options: OpenOptions) -> OnnxRuntimeLibrary | None:
    """What opens sessions that share what they pack, None where sessions are those of the Python binding."""
    from qwen_export.runtimes.backends.onnxruntime.onnxruntime_library import packing_library

    return packing_library() if options.packed_once and not manifest.plugins and manifest.target.device == "cpu" else None


def _tensorrt(bundle: Path, manifest: Manifest, options: OpenOptions) -> Sessions:
    from qwen_export.runtimes.backends.tensorrt.tensorrt_engines import Engines
    from qwen_export.runtimes.backends.tensorrt.tensorrt_session import TensorRTSession

    engines = Engines(bundle, manifest, MappedWeights(bundle, manifest), options.device_id, options.graphs, options.weight_budget)
    return lambda name: TensorRTSession(engines.open(name))


def _openvino(bundle: Path, manifest: Manifest, options: OpenOptions) -> Sessions:
    from qwen_export.runtimes.backends.openvino.openvino_options import openvino_options
    from qwen_export.runtimes.backends.openvino.openvino_session import OpenVinoSession

    properties = openvino_options(manifest, options.threads)

    def session(name: str) -> Session:
        graph = manifest.graphs[name]
        return OpenVinoSession(file_path(options.graphs or bundle, graph.file), graph, properties, later=name in options.later)

    return session


_OPEN: dict[str, Callable[[Path, Manifest, OpenOptions], Sessions]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt,
}


def open_backend(bundle: Path, manifest: Manifest, options: OpenOptions) -> Sessions:
    """The sessions of a bundle that `check_runnable` has let pass."""
    return _OPEN[manifest.target.backend](bundle, manifest, options)


def open_graphs(bundle: Path, manifest: Manifest, options: OpenOptions, names: Iterable[str]) -> dict[str, Session]:
    """Sessions of these graphs by name, one for all stages of a graph. Stages load side by side, and so do all graphs where ONNX Runtime
    repacks weights into the order of its kernels, since it does that with one core per graph. Graphs that share what is packed wait for
    each other anyway."""
    session, names = open_backend(bundle, manifest, options), list(names)
    groups = stage_groups(names)
    repacks = options.repack and manifest.target.device == "cpu" and manifest.target.backend == "onnxruntime"
    if (repacks and _packing_library(manifest, options) is None) or any(len(group) > 1 for group in groups.values()):
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            opened = dict(zip(names, threads.map(session, names), strict=True))
    else:
        opened = {name: session(name) for name in names}
    return {role: opened[role] if group == [role] else StagedSession([opened[name] for name in group]) for role, group in groups.items()}
