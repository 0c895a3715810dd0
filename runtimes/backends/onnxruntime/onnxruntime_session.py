"""The one module that talks to ONNX Runtime: opening a graph, and calls with every input and output bound by address."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

from qwen_export.bundle_contract import FEATURES, LAST_SLOT
from qwen_export.errors import BundleError
from qwen_export.manifest import GraphSpec, WeightSpec
from qwen_export.runtimes.backends.onnxruntime.graph_signature import check_signature
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import PROVIDERS
from qwen_export.runtimes.backends.whole_session import LateSession, WholeCall
from qwen_export.runtimes.memory import cuda_memory
from qwen_export.runtimes.memory.bound_weights import BoundWeights
from qwen_export.runtimes.memory.buffers import ELEMENTS, Buffer
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer, settle
from qwen_export.runtimes.memory.cuda_driver import use_device
from qwen_export.runtimes.memory.cuda_stream import Event, Recording, Stream, device_stream
from qwen_export.runtimes.memory.device import Device
from qwen_export.runtimes.memory.directml_buffer import DmlBuffer
from qwen_export.runtimes.memory.host_buffer import HostBuffer
from qwen_export.runtimes.memory.mapped_weights import MappedWeights

# Options of the execution provider, by kind of device; its number is added. Attention on CUDA is flash attention (1): the default takes
# cuDNN, which makes a plan for every new length of prompt, 0.3 s each on an H200, for prompts that are 5 % faster.
_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"sdpa_kernel": "1"}, "dml": {}}
# The tower: it has a stream of its own, so that pictures are looked at beside the steps of an engine; in fp32 its attention is the
# memory-efficient one (2), and memory is what one picture needs.
_TOWER_OPTIONS = {"sdpa_kernel": "3", "arena_extend_strategy": "kSameAsRequested"}
# ONNX Runtime 1.31 fails in GroupQueryAttention on every GPU but the first that a process used ("cudaErrorInvalidValue").
_ONE_GPU, _ONE_GPU_INPUT = "GroupQueryAttention", LAST_SLOT
_used_gpus: set[int] = set()
_FIXES = {
    "cpu": "Reinstall onnxruntime.",
    "cuda": "pip install onnxruntime-gpu, or build with --device cpu.",
    "dml": "pip install onnxruntime-directml on Windows, or load with device='cpu'.",
}
# Inputs that kernels read on the host, whatever the device.
HOST_INPUTS = ("total_length",)
_HOST = Device("cpu")


class OnnxRuntimeSession(LateSession):
    """One compiled graph, loaded by ONNX Runtime."""

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        device: Device,
        threads: int | None = None,
        plugins: Sequence[Path] = (),
        *,
        weights: MappedWeights | None = None,
        bound: BoundWeights | None = None,
        repack: bool = False,
        folder: Path | None = None,
        later: bool = False,
    ) -> None:
        """`plugins` are libraries with custom ops of the graph; `repack` as in `runtimes.load`. On the CPU the graph uses
        `weights` in place, and shares them with other graphs. ONNX Runtime reads no file outside the graph's directory: elsewhere,
        too, it is given the weights that the bundle refers to. `bound` has those that are inputs of the graph. `folder`: the directory
        that the graph's weights are in, where it is another than the graph's. With `later` the graph is loaded before its first call,
        which most runs may never make."""
        import onnxruntime as ort

        if device.kind == "cuda" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from their Python packages, where the system has none
        ort.disable_telemetry_events()  # nothing leaves the machine
        options = ort.SessionOptions()
        options.log_severity_level = 4  # failures arrive as exceptions
        options.intra_op_num_threads = threads or 0  # 0: one per physical core
        options.inter_op_num_threads = 1
        # Decoder and draft head take turns, each with threads of its own: those that wait must not keep a core busy.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.disable_prepacking", "0" if repack else "1")
        if device.is_host and not repack:  # the order of the kernels is made in the arena, which has to go with the session then
            _share_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
        tower = any(tensor.name == FEATURES for tensor in spec.outputs)
        if device.kind != "cuda" or not tower:  # every length of call would get a plan and a block of memory of its own
            options.enable_mem_pattern = False
        if device.kind == "dml":  # takes calls one after the other
            options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        self.stream = device_stream(device.index) if device.kind == "cuda" and not tower else None
        """What the graph runs on, where calls share it with copies and other graphs."""
        self._beside = Stream(device.index) if device.kind == "cuda" and tower else None
        providers = _providers(ort, device, self.stream)
        if device.kind == "cuda" and any(tensor.name == _ONE_GPU_INPUT for tensor in spec.inputs):
            _require_one_gpu(device.index, str(path))
        for plugin in plugins:
            _register(options, plugin)
        self.spec, self.device = spec, device
        self._opening = (path, options, providers, weights, repack, folder)
        self._bound = bound
        self.weight_inputs: list[tuple[WeightSpec, int]] = []
        """The weights that are inputs of the graph, and where each is for the device."""
        self._weights: dict[str, Any] = {}
        self.turn: AbstractContextManager[object] = nullcontext() if device.is_host else threading.Lock()
        """Held by a call: on a GPU calls take turns, whatever threads share it."""
        if self.stream is not None:
            self.turn, self.queues = self.stream.turn, True
        super().__init__(later=later)

    def _open(self) -> Any:
        import onnxruntime as ort

        path, options, providers, weights, repack, folder = self._opening
        try:
            stored = [weight for weight in self.spec.weights if weight.name not in self.spec.bound]
            if weights is not None and self.device.is_host and not repack:
                self._weights = _values(ort, stored, weights)
                vectors = {weight.name for weight in stored if len(weight.shape) < 2}
                for name, value in self._weights.items():
                    if name not in vectors:
                        options.add_initializer(name, value)
                # The optimizer may give a vector other dims, which it can only if it has the values.
                options.add_external_initializers(list(vectors), [self._weights[name] for name in vectors])
            elif weights is not None:  # copied to the device, or into the kernels' order
                self._weights = _values(ort, [weight for weight in stored if weights.is_reference(weight)], weights)
                options.add_external_initializers(list(self._weights), list(self._weights.values()))
            if folder is not None:
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
            graph: str | bytes = str(path) if folder is None else path.read_bytes()
            self.enter_device()
            native = ort.InferenceSession(graph, options, providers=providers)
            check_signature(native, self.spec, path)
            if self._bound is not None:
                self.weight_inputs = [
                    (weight, self._bound.address(weight)) for weight in self.spec.weights if weight.name in self.spec.bound
                ]
            return native
        except BundleError:
            raise
        except Exception as error:  # ONNX Runtime raises several unrelated types
            raise BundleError(
                "ONNX Runtime could not load the graph",
                where=str(path),
                got=_first_line(error),
                fix="Run `qwen-export check` on the bundle.",
            ) from error

    def enter_device(self) -> None:
        """Kernels of plugins look up the thread's device, when they are made and when they run: have it be the session's."""
        if self.device.kind == "cuda":
            use_device(self.device.index)

    @property
    def records(self) -> bool:
        return self.device.kind == "cuda"

    def buffer(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        if self._beside is not None:
            return CudaBuffer(dtype, shape, self.device.index, stream=self._beside)
        return self.device.buffer(dtype, shape)

    def call(self, *, repeated: bool) -> OnnxRuntimeCall:
        if repeated and self.stream is not None:
            return RecordedCall(self, self.stream)
        return OnnxRuntimeCall(self, stops=not repeated)

    def close(self) -> None:
        if self.stream is not None and not self._closed:
            with suppress(BundleError):  # a call may be under way; whoever waits for it is told what came of it
                settle(self.device.index)
        super().close()
        self._weights = {}


class OnnxRuntimeCall(WholeCall):
    """Bindings of one session. `stops`: whether a run can be stopped."""

    def __init__(self, session: OnnxRuntimeSession, *, stops: bool) -> None:
        import onnxruntime as ort

        self._session = session
        # None costs 80 us less than options without entries; calls that do not come again are long, and can be stopped.
        self._options = ort.RunOptions() if stops else None
        self._binding = session.native.io_binding()
        self._inputs = {tensor.name: tensor for tensor in session.spec.inputs}
        self._outputs = {tensor.name: tensor for tensor in session.spec.outputs}
        device = session.device
        for weight, address in session.weight_inputs:
            self._binding.bind_input(weight.name, device.kind, device.index, ELEMENTS[weight.dtype][1], weight.shape, address)

    def bind_input(self, name: str, buffer: Buffer) -> None:
        buffer = buffer.on(self._session.device.kind, self._session.device.index)
        if isinstance(buffer, DmlBuffer):
            self._binding.bind_ortvalue_input(name, buffer.value)
            return
        device = _HOST if name in HOST_INPUTS else self._session.device
        self._binding.bind_input(name, device.kind, device.index, ELEMENTS[self._inputs[name].dtype][1], buffer.shape, buffer.address)

    def bind_output(self, name: str, buffer: Buffer) -> None:
        if isinstance(buffer, DmlBuffer):
            self._binding.bind_ortvalue_output(name, buffer.value)
            return
        device = self._session.device
        self._binding.bind_output(name, device.kind, device.index, ELEMENTS[self._outputs[name].dtype][1], buffer.shape, buffer.address)

    def stop(self) -> None:
        if self._options is not None:
            self._options.terminate = True  # looked at before each node

    def prepare(self) -> None:
        """Nothing: the first run of a call of fixed shapes is like the others."""

    def run(self) -> None:
        started = time.perf_counter()
        self._session.enter_device()
        try:
            with self._session.turn:
                self._launch()
        finally:
            self._session.busy_s += time.perf_counter() - started

    def _launch(self) -> None:
        try:
            self._session.native.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise BundleError(
                "ONNX Runtime failed while running the graph",
                got=_first_line(error),
                fix="If memory ran out, load with a smaller {max_context}; otherwise run `qwen-export check` on the bundle.",
            ) from error


class RecordedCall(OnnxRuntimeCall):
    """A call that comes again on a GPU, as one CUDA graph of ours: what is sent, the graph's kernels, and what is fetched. A step is some
    300 small kernels, which so take one launch and one wait. The first run is queued kernel by kernel, with which ONNX Runtime gets its
    memory; then the same is recorded, and runs from then on."""

    def __init__(self, session: OnnxRuntimeSession, stream: Stream) -> None:
        import onnxruntime as ort

        super().__init__(session, stops=False)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._stream, self._done = stream, Event(stream)
        self._copies_in: list[tuple[int, HostBuffer, int]] = []
        self._copies_out: list[tuple[HostBuffer, int, int]] = []
        self._recording: Recording | None = None
        self._began = 0.0

    def send(self, target: Buffer, source: HostBuffer) -> None:
        self._copies_in.append((target.address, source, source.nbytes))

    def fetch(self, target: HostBuffer, source: Buffer) -> None:
        self._copies_out.append((target, source.address, target.nbytes))

    def stop(self) -> None:
        """Nothing: what was recorded runs to its end."""

    def run(self) -> None:
        self.queue()
        self.finish()

    def queue(self) -> None:
        self._began = time.perf_counter()
        self._session.require_open()  # a recording would run on memory that is gone
        self._session.enter_device()
        with self._stream.turn:
            if self._recording is not None:
                self._recording.launch()
            else:
                self._queue()
                self._stream.synchronize()
                self._recording = self._stream.record(self._queue, may_allocate=True)
            self._done.record()

    def finish(self) -> None:
        self._session.enter_device()
        self._done.wait()
        self._session.busy_s += time.perf_counter() - self._began

    def _queue(self) -> None:
        for target, source, nbytes in self._copies_in:
            cuda_memory.to_device_later(target, source.address, nbytes, self._stream.handle)
        self._launch()
        for destination, address, nbytes in self._copies_out:
            cuda_memory.to_host_later(destination.address, address, nbytes, self._stream.handle)


def _values(ort: Any, specs: Iterable[WeightSpec], weights: MappedWeights) -> dict[str, Any]:
    """Weights as values over the mapped memory; the session needs them as long as it lives."""

    def value(weight: WeightSpec) -> Any:
        size, number = ELEMENTS[weight.dtype]
        array = weights.bytes(weight).view(f"u{size}").reshape(weight.shape)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, number)

    return {weight.name: value(weight) for weight in specs}


@cache
def _share_arena() -> None:
    """One arena for the activations of all sessions of this process, since the graphs of a bundle take turns. It grows by what is requested
    for (strategy 1), a session's own arena by the next power of two."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


def _register(options: Any, plugin: Path) -> None:
    try:
        options.register_custom_ops_library(str(plugin.resolve()))
    except Exception as error:
        raise BundleError(
            "a library of the bundle cannot be loaded on this machine",
            where=str(plugin),
            got=_first_line(error),
            fix="Build the checkpoint on a machine like this one, or without the plugin.",
        ) from error


def _providers(ort: Any, device: Device, stream: Stream | None) -> list[Any]:
    name = PROVIDERS[device.kind]
    if name not in ort.get_available_providers():
        raise BundleError(
            f"the bundle is compiled for {device.kind}, and the installed ONNX Runtime has no {name}",
            got=", ".join(ort.get_available_providers()),
            fix=_FIXES[device.kind],
        )
    if device.is_host:
        return [name]
    options = _OPTIONS[device.kind]
    if stream is not None:
        options = options | {"user_compute_stream": str(stream.handle)}
    elif device.kind == "cuda":
        options = _TOWER_OPTIONS
    return [(name, {"device_id": str(device.index)} | options), PROVIDERS["cpu"]]


def _require_one_gpu(index: int, where: str) -> None:
    """Refuse the second GPU of a process before the first call fails on it."""
    others = _used_gpus - {index}
    if others:
        raise BundleError(
            f"ONNX Runtime's {_ONE_GPU} runs on one GPU per process",
            where=where,
            got=f"device {index}, and device {min(others)} was used before",
            expected="the same device",
            fix="Load the bundle in a process of its own.",
        )
    _used_gpus.add(index)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
