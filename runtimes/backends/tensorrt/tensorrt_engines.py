"""What the engines of one bundle share on one GPU: the library, a stream, the weights, and memory for what a call computes.

Everything is released in order, contexts before engines before the library's runtime: by reference counts when the last user of a bundle
goes, and before the interpreter ends otherwise.
"""

from __future__ import annotations

import atexit
import mmap
import sys
import weakref
from math import prod
from pathlib import Path
from typing import Any

from qwen_export.errors import BundleError
from qwen_export.manifest import GraphSpec, Manifest, file_path
from qwen_export.runtimes.backends.tensorrt import delta_net_plugin
from qwen_export.runtimes.backends.tensorrt.kernel_cache import KernelFile
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import AOT_PLUGINS, RUNTIME_CACHE, Library, load_library
from qwen_export.runtimes.memory import cuda_driver, cuda_memory
from qwen_export.runtimes.memory.cuda_stream import Recording, Stream
from qwen_export.runtimes.memory.device_weights import DeviceWeights
from qwen_export.runtimes.memory.mapped_weights import MappedWeights, weight_bytes

_loaded: weakref.WeakSet[Engine] = weakref.WeakSet()

# Reasons to refuse an engine, by their names in EngineInvalidityDiagnostics: what is wrong, and what to do.
_BUILD_AGAIN = "Build the bundle again; if that does not help, report it with the version of the library."
_RELOAD = "Load the bundle again; if memory ran out, with a smaller {max_context}."
_REASONS = {
    "MALFORMED_ENGINE": ("it is not an engine of this library", "Build the bundle again."),
    "VERSION_MISMATCH": ("it was compiled by another version of the library", "Install the version that `qwen-export check` names."),
    "UNSUPPORTED_CC": ("it was not compiled for this GPU", "Run `qwen-export rebuild` on the bundle."),
    "OLD_CUDA_DRIVER": ("the driver is too old", "Update the NVIDIA driver."),
    "OLD_CUDA_RUNTIME": ("the CUDA runtime is too old", "Update the library."),
    "INSUFFICIENT_GPU_MEMORY": ("the GPU has too little memory", "End other programs that use the GPU."),
    "CUDA_ERROR": ("CUDA does not work", "See whether `nvidia-smi` lists a GPU."),
}


class Scratch:
    """Memory for intermediate results. Calls on one stream never overlap, so all engines of a bundle use the same."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._pieces: list[tuple[int, int]] = []

    def take(self, nbytes: int) -> int:
        """An address with room for `nbytes`. Pieces given out before stay where they are: recorded calls contain their addresses."""
        for size, address in self._pieces:
            if size >= nbytes:
                return address
        address = cuda_memory.allocate_raw(nbytes)
        self._pieces.append((nbytes, address))
        return address

    def __del__(self) -> None:
        if not sys.is_finalizing():
            for _, address in getattr(self, "_pieces", ()):
                cuda_memory.free(address)


class Engines:
    """Opens the engines of one bundle. `weights` are the bundle's, on the host; `graphs` is their directory, if not the bundle.
    `weight_budget`: bytes on the GPU for weights that engines can leave in host memory, None for all of them."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        weights: MappedWeights,
        device_id: int = 0,
        graphs: Path | None = None,
        weight_budget: int | None = None,
    ) -> None:
        self.library: Library = load_library(manifest.target.backend)
        self._bundle, self._manifest, self._mapped, self._graphs = bundle, manifest, weights, graphs or bundle
        self._weight_budget = weight_budget
        if manifest.engine is not None and manifest.engine.plugins and not self.library.has(AOT_PLUGINS):
            delta_net_plugin.register(self.library)
        self.stream = Stream(device_id)
        self.weights = DeviceWeights(weights, self.stream)
        self.scratch = Scratch(self.stream)
        self._runtime = self.library.api.Runtime(self.library.log)
        major, minor = cuda_driver.compute_capability(device_id)
        driver = ".".join(map(str, cuda_driver.driver_version()))
        self._machine = (self.library.version, cuda_driver.device_name(device_id), f"{major}.{minor}", driver)

    def open(self, name: str) -> Engine:
        """The engine of one graph, its weights on the device. Raises BundleError where the library refuses it."""
        spec = self._manifest.graphs[name]
        cuda_driver.use_device(self.stream.device_id)
        path = file_path(self._graphs, spec.file)
        self.library.take_messages()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            native = self._runtime.deserialize_cuda_engine(data)
            if native is None:
                raise self._refused(path, data)
        kernels = KernelFile(self._manifest.files[spec.file].sha256, self._machine)
        return Engine(self, native, name, spec, kernels)

    def _refused(self, path: Path, data: mmap.mmap) -> BundleError:
        reason = self.library.take_messages() or "it gives no reason"
        fix = "Run `qwen-export check` on the bundle; `qwen-export rebuild` compiles it for this machine."
        flags = getattr(self.library.api, "EngineInvalidityDiagnostics", None)  # TensorRT-RTX only
        if flags is not None:
            _, found = self._runtime.get_engine_validity(data)
            named = [_REASONS[name] for name, flag in flags.__members__.items() if name in _REASONS and int(found) & int(flag)]
            reason, fix = named[0] if named else (reason, fix)
        return BundleError(
            f"{self.library.flavour.name} {self.library.version} refuses the engine on {self._machine[1]}, SM {self._machine[2]}",
            where=str(path),
            got=reason,
            fix=fix,
        )

    def stream_weights(self, native: Any, spec: GraphSpec) -> None:
        """Set how much of an engine's own weights is kept on the GPU: of a budget, each engine has the share that it has of their files."""
        streamable = int(native.streamable_weights_size)
        if not streamable:
            return
        wanted = streamable
        if self._weight_budget is not None:
            sizes = {graph.file: self._manifest.files[graph.file].size for graph in self._manifest.graphs.values()}
            wanted = min(streamable, self._weight_budget * sizes[spec.file] // sum(sizes.values()))
        native.weight_streaming_budget_v2 = wanted
        if native.weight_streaming_budget_v2 != wanted:
            raise BundleError(
                "TensorRT does not take the budget for weights",
                where=spec.file,
                got=f"{wanted} bytes of {streamable}: {self.library.take_messages() or 'no reason'}",
                fix="Load the bundle without {weight_budget}.",
            )

    @staticmethod
    def fits_beside(nbytes: int) -> bool:
        """Whether the GPU has room for weights twice: as the bundle has them, and in an engine that gets them."""
        return 2 * nbytes < cuda_driver.memory_info()[0]

    def refit(self, native: Any, spec: GraphSpec) -> None:
        """Give a stripped engine its weights from the bundle.

        The refitter takes all of them at a time. They come from the GPU, where they were copied part by part, if there is room for them
        together with the engine's own; a process then never has more than a few megabytes of them. Else they are read where their file is
        mapped."""
        api, known = self.library.api, {weight.name: weight for weight in spec.weights}
        refitter = api.Refitter(native, self.library.log)
        missing = sorted(refitter.get_missing_weights())
        if not missing:
            return
        unknown = [name for name in missing if name not in known]
        if unknown:
            raise BundleError(
                "the engine needs a weight that the bundle does not have", where=str(self._bundle), got=unknown[0], fix=_BUILD_AGAIN
            )
        wanted = [known[name] for name in missing]
        copies = DeviceWeights(self._mapped, self.stream)
        on_device = self.fits_beside(sum(weight_bytes(weight) for weight in wanted))
        if on_device:
            copies.upload(wanted)
        for weight in wanted:
            address = copies.address(weight) if on_device else self._mapped.bytes(weight).ctypes.data
            values = api.Weights(self.library.data_type(weight.dtype), address, prod(weight.shape))
            place = api.TensorLocation.DEVICE if on_device else api.TensorLocation.HOST
            if not refitter.set_named_weights(weight.name, values, place):
                raise BundleError(
                    "the engine does not take a weight of the bundle",
                    where=str(self._bundle),
                    got=f"{weight.name}: {self.library.take_messages()}",
                    fix=_BUILD_AGAIN,
                )
        if not refitter.refit_cuda_engine():
            raise BundleError(
                "the engine could not be given its weights", where=str(self._bundle), got=self.library.take_messages(), fix=_BUILD_AGAIN
            )
        self._mapped.release(wanted)


class Engine:
    """One loaded engine and what its contexts have in common."""

    def __init__(self, engines: Engines, native: Any, name: str, spec: GraphSpec, kernels: KernelFile) -> None:
        self.engines, self.native, self.name, self.spec, self._kernels = engines, native, name, spec, kernels
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        api = engines.library.api
        tensors = [native.get_tensor_name(i) for i in range(native.num_io_tensors)]
        inputs = {tensor for tensor in tensors if native.get_tensor_mode(tensor) == api.TensorIOMode.INPUT}
        self._check(inputs, set(tensors) - inputs)
        bound = [weight for weight in spec.weights if weight.name in inputs]
        if len(bound) < len(spec.weights) and native.refittable:
            engines.refit(native, spec)
        engines.stream_weights(native, spec)
        engines.weights.upload(bound)
        self.bound_weights: dict[str, int] = {weight.name: engines.weights.address(weight) for weight in bound}
        self._config = native.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(api.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache = self._config.create_runtime_cache() if engines.library.has(RUNTIME_CACHE) else None
        if self._cache is not None:
            kept = kernels.read()
            if kept and not self._cache.deserialize(kept):
                engines.library.take_messages()  # written by another version: compiled again
            self._config.set_runtime_cache(self._cache)
        _loaded.add(self)

    def context(self) -> Context:
        """A new context: its addresses are its own, its scratch memory is that of the bundle."""
        context = Context(self, self.native.create_execution_context(runtime_config=self._config))
        self._contexts.add(context)
        return context

    def keep_kernels(self) -> None:
        """Leave what was compiled so far for the next process."""
        if self._cache is not None:
            self._kernels.write(bytes(memoryview(self._cache.serialize())))

    def close(self) -> None:
        """Release the engine, its contexts first. Calls that still refer to it cannot run any more."""
        for context in list(self._contexts):
            context.close()
        self._cache = self._config = self.native = None

    def __del__(self) -> None:
        self.close()

    def _check(self, inputs: set[str], outputs: set[str]) -> None:
        """The engine has the tensors of the manifest, in their types and shapes."""
        spec, native, library = self.spec, self.native, self.engines.library
        weights = {weight.name for weight in spec.weights}
        wrong = sorted(
            ({tensor.name for tensor in spec.inputs} ^ (inputs - weights)) | ({tensor.name for tensor in spec.outputs} ^ outputs)
        )
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.name not in wrong:
                have = (library.dtype(native.get_tensor_dtype(tensor.name)), tuple(native.get_tensor_shape(tensor.name)))
                host = native.get_tensor_location(tensor.name) == library.api.TensorLocation.HOST
                if have != (tensor.dtype, tensor.shape) or host:
                    wrong.append(f"{tensor.name} {have[0]}{list(have[1])}{' on the host' if host else ''}")
        if wrong:
            raise BundleError(
                f"the engine of graph {self.name} is not what the manifest describes",
                got=", ".join(wrong[:4]),
                fix="Build the bundle again.",
            )


class Context:
    """One set of addresses for an engine."""

    def __init__(self, engine: Engine, native: Any) -> None:
        if native is None:
            raise BundleError(
                "TensorRT could not prepare the engine for calls",
                got=engine.engines.library.take_messages() or "no reason",
                fix="Load with a smaller {max_context}, or end other programs that use the GPU.",
            )
        self._engine, self.native = engine, native
        self.recording: Recording | None = None
        """A run as a CUDA graph, from the first call that records it."""
        size = engine.native.device_memory_size_v2
        if size:
            native.set_device_memory(engine.engines.scratch.take(size), size)
        for name, address in engine.bound_weights.items():
            self.bind(name, address)

    def bind(self, name: str, address: int) -> None:
        if not self.native.set_tensor_address(name, address):
            raise BundleError(
                "TensorRT does not take an address", got=f"{name}: {self._engine.engines.library.take_messages()}", fix=_BUILD_AGAIN
            )

    def queue(self) -> None:
        """Put one run on the bundle's stream."""
        engines = self._engine.engines
        if not self.native.execute_async_v3(engines.stream.handle):
            raise BundleError(
                "TensorRT could not run the engine",
                where=self._engine.name,
                got=engines.library.take_messages() or "no reason",
                fix=_RELOAD,
            )

    def close(self) -> None:
        self.recording = None
        self.native = None

    def __del__(self) -> None:
        self.close()


@atexit.register
def release_engines() -> None:
    """Close every engine of this process. The library has to outlive them."""
    for engine in list(_loaded):
        engine.close()
