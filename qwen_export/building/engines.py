"""From lowered graphs, with their weights written, to engines; and from a bundle's graphs to engines for another machine.

Imports neither torch nor onnx: `qwen-export rebuild` runs where bundles run.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qwen_export.engine_options import BOUND, EMBEDDED, EngineOptions
from qwen_export.errors import BundleError
from qwen_export.manifest import (
    EngineSpec,
    GraphSpec,
    Manifest,
    WeightSpec,
    file_path,
    hash_file,
    load_manifest,
    weights_path,
    write_manifest,
)
from qwen_export.plugins.tensorrt.build_engine import BorrowedWeight, Built, build_engine, check_options
from qwen_export.plugins.tensorrt.plugin_registry import make_known
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import Library, load_library, minimum_cuda, numbers
from qwen_export.runtimes.memory import cuda_driver
from qwen_export.runtimes.memory.mapped_weights import weight_bytes

# What of the options a later build needs to know; the rest is about the machine that builds.
_KEPT = (
    "hardware_compatibility",
    "version_compatible",
    "opt_level",
    "workspace",
    "aux_streams",
    "tiling",
    "weight_streaming",
    "weights",
    "tf32",
)
Say = Callable[[str], None]


def engine_file(graph: str) -> str:
    return f"{graph}.engine"


def onnx_file(graph: str) -> str:
    return f"{graph}.onnx"


def ready_library(flavour: str, options: EngineOptions) -> Library:
    """The flavour, if it can do here what the options require; otherwise an error."""
    library = load_library(flavour)
    check_options(library, options, current_sm())
    if options.plugins:
        make_known(library)
    return library


def for_this_machine(options: EngineOptions) -> EngineOptions:
    """The same, for the GPU that is there where none is named."""
    current = current_sm()
    return replace(options, sms=(current,)) if not options.sms and current is not None else options


def current_sm() -> str | None:
    """Compute capability of the first GPU, None where there is none."""
    try:
        major, minor = cuda_driver.compute_capability(0)
    except BundleError:
        return None
    return f"{major}{minor}"


def compile_graph(library: Library, graph: str, model: bytes, output: Path, options: EngineOptions, weights: Mapping[str, Any]) -> Built:
    """One engine from a serialized ONNX model. `weights`: its initializers as buffers, none where they are inputs."""
    addresses = {name: np.frombuffer(data, np.uint8) for name, data in weights.items()}
    borrowed = {name: BorrowedWeight(array.ctypes.data, array.nbytes) for name, array in addresses.items()}
    return build_engine(library, model, output, options, borrowed, where=graph)


def engine_spec(library: Library, options: EngineOptions, onnx: tuple[str, ...], kernels: str = "") -> EngineSpec:
    """For the manifest. `onnx`: the graphs that the bundle carries as ONNX; `kernels`: the CUDA that those of our plugins need, if any."""
    return EngineSpec(
        library.version,
        options.sms,
        options.hardware_compatibility,
        options.version_compatible,
        max(minimum_cuda(library.flavour.name), kernels, key=numbers),
        options.weights,
        onnx,
        {name: value for name, value in asdict(options).items() if name in _KEPT},
        options.plugins,
    )


@contextmanager
def mapped(places: Mapping[str, tuple[Path, int, int]]) -> Iterator[dict[str, memoryview]]:
    """Weights in place: per name a file, an offset and a length in bytes."""
    maps: dict[Path, mmap.mmap] = {}
    views: dict[str, memoryview] = {}
    try:
        for name, (path, offset, nbytes) in places.items():
            if path not in maps:
                with path.open("rb") as file:
                    maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            views[name] = memoryview(maps[path])[offset : offset + nbytes]
        yield views
    finally:
        views.clear()
        # A view that an error still refers to keeps its map; it goes with the error.


def rebuild(bundle: Path, options: EngineOptions, say: Say = lambda line: None) -> Manifest:
    """Compile the engines of a bundle again from the ONNX that it carries: for another GPU, or another version of the library. What
    `options` leave at their defaults is as the bundle was built, and how weights reach the engines in any case. Returns the new manifest.

    Raises BundleError where the bundle has no ONNX; on any failure the bundle stays as it is."""
    manifest = load_manifest(bundle)
    spec = manifest.engine
    if spec is None or not spec.onnx:
        raise BundleError(
            "the bundle cannot be compiled again: it does not carry its graphs",
            where=str(bundle),
            fix="Build it with {carry_onnx} where the checkpoint is.",
        )
    usual = EngineOptions()
    kept = {name: value for name, value in spec.options.items() if name in _KEPT and getattr(options, name) == getattr(usual, name)}
    options = for_this_machine(replace(options, **kept | {"weights": spec.weights, "plugins": spec.plugins}))
    library = ready_library(manifest.target.backend, options)
    with TemporaryDirectory(dir=bundle, prefix=".rebuild-") as directory:
        for name in spec.onnx:
            say(name)
            graph = manifest.graphs[name]
            with mapped(weight_places(bundle, manifest, graph)) as weights:
                held = weights if spec.weights != BOUND else {}
                compile_graph(library, name, file_path(bundle, onnx_file(name)).read_bytes(), Path(directory) / graph.file, options, held)
        files = dict(manifest.files)
        for name in spec.onnx:
            files[manifest.graphs[name].file] = hash_file(Path(directory) / manifest.graphs[name].file)
        # The kernels of our plugins are the same, in the ONNX.
        engine = engine_spec(library, options, spec.onnx, spec.minimum_cuda if spec.plugins else "")
        changed = replace(manifest, files=files, engine=engine, verification={})
        for name in spec.onnx:
            os.replace(Path(directory) / manifest.graphs[name].file, bundle / manifest.graphs[name].file)
        write_manifest(bundle, changed)
    return changed


def weight_places(bundle: Path, manifest: Manifest, graph: GraphSpec) -> dict[str, tuple[Path, int, int]]:
    """Where the weights of a graph are stored, for `mapped`."""

    def place(weight: WeightSpec) -> tuple[Path, int, int]:
        return weights_path(bundle, manifest, weight.file), weight.offset, weight_bytes(weight)

    return {weight.name: place(weight) for weight in graph.weights}


__all__ = (
    "EMBEDDED",
    "compile_graph",
    "current_sm",
    "engine_file",
    "engine_spec",
    "mapped",
    "onnx_file",
    "ready_library",
    "rebuild",
    "weight_places",
)
