"""One ONNX graph to one engine, over the API that both flavours share.

Polygraphy is not used: it takes its TensorRT from an environment variable that is read when it is imported, under the name `tensorrt_rtx`,
which the wheels for CUDA 13 do not install; and its loaders hold weights and engine in memory at once, which the two calls below avoid.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_export import engine_options
from qwen_export.engine_options import BOUND, STRIPPED, EngineOptions
from qwen_export.errors import REPORT, BuildError, UnsupportedError
from qwen_export.runtimes.backends.tensorrt.kernel_cache import write_whole
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import (
    AOT_PLUGINS,
    FOREIGN_SM,
    HARDWARE_COMPATIBILITY,
    TILING,
    TIMING_CACHE,
    VERSION_COMPATIBILITY,
    Library,
)


@dataclass(frozen=True)
class Built:
    """What the parser made of a graph, before fusion: layers by kind, and the names of inputs and outputs."""

    layers: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class BorrowedWeight:
    """Bytes of an initializer that stay where they are: its address must be valid until the engine is built."""

    address: int
    nbytes: int


def build_engine(
    library: Library,
    model: bytes,
    output: Path,
    options: EngineOptions,
    weights: Mapping[str, BorrowedWeight] | None = None,
    where: str = "",
) -> Built:
    """Compile a serialized ONNX model into the file `output`. `weights` are its external initializers, by name; `where` is what errors and
    the layer dump call the graph. Raises BuildError with the messages of TensorRT."""
    api = library.api
    library.take_messages()
    builder = api.Builder(library.log)
    flags = api.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = api.OnnxParser(network, library.log)
    if not _parse(parser, model, weights or {}):
        errors = "; ".join(f"{parser.get_error(i).node_name()}: {parser.get_error(i).desc()}" for i in range(min(3, parser.num_errors)))
        old = options.plugins and not library.has(AOT_PLUGINS)
        fix = "Install TensorRT-RTX 1.7 or newer, or leave out {plugins}." if old else f"Install another version of TensorRT. {REPORT}"
        raise BuildError("TensorRT cannot read the graph", where=where, got=errors or library.take_messages(), fix=fix)
    _let_decompose(api, network)
    summary = _summary(network)
    if options.layer_dump is not None:
        _dump_layers(network, options.layer_dump / f"{where}.layers.txt")
    config = _config(library, builder, options)
    cache = open_timing_cache(config, options)
    writer = _file_writer(api, output)
    with writer:
        built = builder.build_serialized_network_to_stream(network, config, writer)
    if not built:
        output.unlink(missing_ok=True)
        messages = library.take_messages()
        raise BuildError("TensorRT cannot build an engine of the graph", where=where, got=messages, fix=_fix(messages))
    if cache is not None and options.timing_cache is not None:
        write_whole(options.timing_cache, bytes(memoryview(cache.serialize())))
    return summary


def _fix(messages: str) -> str:
    """What to do about the messages of TensorRT when a build fails."""
    if "workspace" in messages.lower():
        return "Raise {workspace}, or leave it out."
    if "out of memory" in messages.lower() or "OutOfMemory" in messages:
        return "End other programs that use the GPU, or build with a smaller {chunk} or {max_context}."
    return "Set {engine_weights} to embedded, which TensorRT compiles in another way, or install another version of it."


def _parse(parser: Any, model: bytes, weights: Mapping[str, BorrowedWeight]) -> bool:
    if not weights:
        return bool(parser.parse(model))
    if not parser.load_model_proto(model):
        return False
    return all(parser.load_initializer(name, w.address, w.nbytes) for name, w in weights.items()) and bool(parser.parse_model_proto())


def _let_decompose(api: Any, network: Any) -> None:
    """Attention layers for which a GPU has no kernel of their own are made of others, instead of being refused."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = api.IAttentionInputLayer  # what the Python API needs instead of a cast
            layer.attention.decomposable = True


def _config(library: Library, builder: Any, options: EngineOptions) -> Any:
    api, config = library.api, builder.create_builder_config()
    flags = api.BuilderFlag
    for flag, wanted in (
        ("TF32", options.tf32),
        ("VERSION_COMPATIBLE", options.version_compatible),
        # RTX has no lean runtime to put into the engine, and a bundle's host has the library.
        ("EXCLUDE_LEAN_RUNTIME", options.version_compatible),
        ("STRIP_PLAN", options.weights == STRIPPED),
        ("REFIT", options.weights == STRIPPED),
        ("WEIGHT_STREAMING", options.weight_streaming),
    ):
        (config.set_flag if wanted else config.clear_flag)(getattr(flags, flag))
    if options.workspace is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, options.workspace)
    if options.opt_level is not None:
        config.builder_optimization_level = options.opt_level
    if options.aux_streams is not None:
        config.max_aux_streams = options.aux_streams
    if library.has(TILING):
        config.tiling_optimization_level = getattr(api.TilingOptimizationLevel, engine_options.TILING[options.tiling])
    level = engine_options.HARDWARE_COMPATIBILITY[options.hardware_compatibility]
    config.hardware_compatibility_level = getattr(api.HardwareCompatibilityLevel, level)
    if options.layer_dump is not None:
        config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    _set_sms(library, config, options.sms)
    return config


def _set_sms(library: Library, config: Any, sms: tuple[str, ...]) -> None:
    if not library.has(FOREIGN_SM):
        return
    known = library.api.ComputeCapability.__members__
    if len(sms) < 2 and not (sms and f"SM{sms[0]}" in known):
        config.num_compute_capabilities = 1
        config.set_compute_capability(known["CURRENT"], 0)
        return
    config.num_compute_capabilities = len(sms)
    for i, sm in enumerate(sms):
        config.set_compute_capability(known[f"SM{sm}"], i)


def check_options(library: Library, options: EngineOptions, current: str | None) -> None:
    """Refuse before anything is built what this library cannot do on this machine. `current`: the GPU's compute capability, None without a
    GPU."""
    name, gpu = f"{library.flavour.name} {library.version}", current is not None
    if not options.sms:
        raise UnsupportedError("there is no GPU here to build engines for", fix="Name them with {sms}, for example 89,120.")
    if options.sms != (current,):
        if not library.has(FOREIGN_SM):
            raise UnsupportedError(
                f"{name} builds on the GPU that runs the engine",
                got=f"SM {', '.join(options.sms)} on {f'SM {current}' if gpu else 'a machine without a GPU'}",
                fix="Build on that machine, or there with `qwen-export rebuild`.",
            )
        known = sorted((n.removeprefix("SM") for n in library.api.ComputeCapability.__members__ if n.startswith("SM")), key=int)
        unknown = [sm for sm in options.sms if sm not in known]
        if unknown:
            raise UnsupportedError(
                f"{name} cannot build for this SM",
                got=", ".join(unknown),
                expected=", ".join(known),
                fix="Name one of these with {sms}, or install a newer TensorRT.",
            )
    if options.weights == STRIPPED and not gpu:
        # Its compiler makes the kernels that rearrange refitted weights, and needs the driver for that.
        raise UnsupportedError(
            f"{name} builds engines without their weights only where there is a GPU",
            got="stripped",
            fix="Set {engine_weights} to bound, whose engines have no weights either.",
        )
    if options.weight_streaming and options.weights == BOUND:
        raise UnsupportedError(
            "{weight_streaming} needs weights inside the engines, and {engine_weights} makes them inputs",
            got="bound",
            fix="Set {engine_weights} to embedded.",
        )
    for capability, what, option, wanted in (
        (TIMING_CACHE, "timing cache", "timing_cache", options.timing_cache is not None),
        (HARDWARE_COMPATIBILITY, "compatibility of hardware", "hardware_compatibility", options.hardware_compatibility != "none"),
        (VERSION_COMPATIBILITY, "compatibility of versions", "version_compatible", options.version_compatible),
        (TILING, "search for tilings", "tiling", options.tiling != "none"),
    ):
        if wanted and not library.has(capability):
            raise UnsupportedError(f"{name} has no {what}: {library.flavour.lacks[capability]}", fix=f"Leave out {{{option}}}.")
    if options.timing_cache is not None and options.timing_cache.is_dir():
        raise UnsupportedError("the timing cache is a file", got=f"the directory {options.timing_cache}", fix="Name a file in it.")


def open_timing_cache(config: Any, options: EngineOptions) -> Any:
    """What earlier builds measured, None without a file for it. Measurements of another GPU or version are an error: the builder would
    ignore them, and the file would be overwritten at the end."""
    path = options.timing_cache
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BuildError(
            "the timing cache is not of this GPU and version of TensorRT",
            where=str(path),
            fix="Name another file with {timing_cache}; a file that does not exist is made.",
        )
    return cache


def _summary(network: Any) -> Built:
    kinds = [network.get_layer(i).type.name for i in range(network.num_layers)]
    inputs = tuple(network.get_input(i).name for i in range(network.num_inputs))
    outputs = tuple(network.get_output(i).name for i in range(network.num_outputs))
    return Built({kind: kinds.count(kind) for kind in sorted(set(kinds))}, inputs, outputs)


def _dump_layers(network: Any, path: Path) -> None:
    """A line per layer as it was before fusion: kind, name, types and shapes of its outputs."""
    lines = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        outputs = [layer.get_output(j) for j in range(layer.num_outputs)]
        described = ", ".join(f"{tensor.dtype.name.lower()}{list(tensor.shape)}" for tensor in outputs if tensor is not None)
        lines.append(f"{layer.type.name:20} {layer.name} -> {described}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _file_writer(api: Any, path: Path) -> Any:
    """An IStreamWriter into a file: an engine with its weights is never in memory twice."""

    class Writer(api.IStreamWriter):
        def __init__(self) -> None:
            api.IStreamWriter.__init__(self)
            self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

        def write(self, data: bytes) -> int:
            view, done = memoryview(data), 0
            while done < len(view):
                done += os.write(self.file, view[done : done + (64 << 20)])
            return done

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            os.close(self.file)

    return Writer()
