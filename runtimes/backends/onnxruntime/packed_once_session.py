"""Sessions of one bundle on the CPU that share what ONNX Runtime makes of the weights.

Products over codes are fast in an order of the kernels only, which a session makes of the weights when it is opened: a copy of all weights
per graph, and a static bundle has up to six graphs. A container that sessions are created with keeps the copies by what is in them, so that
all graphs read one. Python's InferenceSession takes no container; these sessions are made through ONNX Runtime's C interface."""

from __future__ import annotations

import ctypes
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_export.errors import BundleError
from qwen_export.manifest import GraphSpec, WeightSpec
from qwen_export.runtimes.backends.onnxruntime.graph_signature import check_signature
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_library import OnnxRuntimeFailure, OnnxRuntimeLibrary
from qwen_export.runtimes.backends.whole_session import LateSession, WholeCall
from qwen_export.runtimes.memory.buffers import ELEMENTS, Buffer
from qwen_export.runtimes.memory.device import Device
from qwen_export.runtimes.memory.mapped_weights import MappedWeights, weight_bytes

_CONFIG = {
    "session.disable_prepacking": "0",
    "session.use_env_allocators": "1",
    # The graphs take turns, each with threads of its own: those that wait must not keep a core busy.
    "session.force_spinning_stop": "1",
}
_NAMES = {number: f"tensor({name})" for name, (_, number) in ELEMENTS.items()}


class PackedWeights:
    """The mapped weights of a bundle, and what its sessions have made of them."""

    def __init__(self, library: OnnxRuntimeLibrary, mapped: MappedWeights) -> None:
        self.library, self.mapped = library, mapped
        self._system = ctypes.CDLL(None) if sys.platform == "linux" else None
        self.container = library.made("CreatePrepackedWeightsContainer")
        weakref.finalize(self, library.release, "PrepackedWeightsContainer", self.container)

    def value(self, weight: WeightSpec) -> int:
        """A tensor over the mapped memory of a weight."""
        address = self.mapped.bytes(weight).ctypes.data
        return self.library.tensor(address, weight_bytes(weight), weight.shape, ELEMENTS[weight.dtype][1])

    def settle(self, spec: GraphSpec) -> None:
        """Give back what opening a graph has left: mapped weights, of which what is still read comes back page by page, and the copies
        that were made to find out that they are there already."""
        self.mapped.release(spec.weights)
        if self._system is not None and hasattr(self._system, "malloc_trim"):
            self._system.malloc_trim(0)


@dataclass(frozen=True)
class _Tensor:
    """An input or output as the loaded graph has it."""

    name: str
    type: str
    shape: tuple[int, ...]


class PackedOnceSession(LateSession):
    """One graph of static shapes, loaded by ONNX Runtime."""

    records = False

    def __init__(
        self, path: Path, spec: GraphSpec, threads: int | None, weights: PackedWeights, *, folder: Path | None = None, later: bool = False
    ) -> None:
        """`folder`: the directory that the graph's weights are in, where it is another than the graph's. With `later` the graph is loaded
        before its first call, which most runs may never make."""
        self.spec, self.device = spec, Device("cpu")
        self._path, self._threads, self._weights, self._folder = path, threads or 0, weights, folder or path.parent
        self._values: list[int] = []
        self._calls: weakref.WeakSet[PackedOnceCall] = weakref.WeakSet()
        super().__init__(later=later)

    @property
    def library(self) -> OnnxRuntimeLibrary:
        return self._weights.library

    def _open(self) -> int:
        """The handle of ONNX Runtime's session."""
        library, options = self.library, self.library.made("CreateSessionOptions")
        graph = self._path.read_bytes()
        try:
            self._configure(options)
            self._native = library.made(
                "CreateSessionFromArrayWithPrepackedWeightsContainer",
                library.env,
                graph,
                len(graph),
                options,
                self._weights.container,
            )
            check_signature(self, self.spec, self._path)
        except OnnxRuntimeFailure as error:
            self._release()
            raise BundleError(
                "ONNX Runtime could not load the graph",
                where=str(self._path),
                got=str(error).strip().splitlines()[0],
                fix="Run `qwen-export check` on the bundle.",
            ) from error
        except BundleError:
            self._release()
            raise
        finally:
            library.release("SessionOptions", options)
        self._weights.settle(self.spec)
        return int(self._native)

    def _configure(self, options: int) -> None:
        library = self.library
        library.call("SetSessionLogSeverityLevel", options, 4)
        library.call("SetIntraOpNumThreads", options, self._threads)
        library.call("SetInterOpNumThreads", options, 1)
        library.call("DisableMemPattern", options)
        folder = {"session.model_external_initializers_file_folder_path": str(self._folder.resolve())}
        for entry, setting in (_CONFIG | folder).items():
            library.call("AddSessionConfigEntry", options, entry.encode(), setting.encode())
        given = [weight for weight in self.spec.weights if weight.dtype in ELEMENTS]
        values = {weight.name: self._weights.value(weight) for weight in given}
        self._values = list(values.values())
        vectors = [weight.name for weight in given if len(weight.shape) < 2]
        for name, value in values.items():
            if name not in vectors:
                library.call("AddInitializer", options, name.encode(), value)
        # The optimizer may give a vector other dims, which it can only if it has the values.
        count = len(vectors)
        names, handles = (
            (ctypes.c_char_p * count)(*(name.encode() for name in vectors)),
            (ctypes.c_void_p * count)(*map(values.get, vectors)),
        )
        library.call("AddExternalInitializers", options, names, handles, count)

    def get_inputs(self) -> list[_Tensor]:
        """As onnxruntime.InferenceSession has them, for `check_signature`."""
        return self._tensors("Input")

    def get_outputs(self) -> list[_Tensor]:
        return self._tensors("Output")

    def _tensors(self, kind: str) -> list[_Tensor]:
        library, count = self.library, ctypes.c_size_t()
        library.call(f"SessionGet{kind}Count", self._native, ctypes.byref(count))
        return [self._tensor(kind, index) for index in range(count.value)]

    def _tensor(self, kind: str, index: int) -> _Tensor:
        library, rank, element = self.library, ctypes.c_size_t(), ctypes.c_int()
        text = library.made(f"SessionGet{kind}Name", self._native, index, library.allocator)
        name = ctypes.string_at(text).decode()
        library.call("AllocatorFree", library.allocator, text)
        info = library.made(f"SessionGet{kind}TypeInfo", self._native, index)
        tensor = library.made("CastTypeInfoToTensorInfo", info)
        library.call("GetTensorElementType", tensor, ctypes.byref(element))
        library.call("GetDimensionsCount", tensor, ctypes.byref(rank))
        shape = (ctypes.c_int64 * rank.value)()
        library.call("GetDimensions", tensor, shape, rank.value)
        library.release("TypeInfo", info)
        return _Tensor(name, _NAMES.get(element.value, str(element.value)), tuple(shape))

    def buffer(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        return self.device.buffer(dtype, shape)

    def call(self, *, repeated: bool) -> PackedOnceCall:
        made = PackedOnceCall(self)
        self._calls.add(made)
        return made

    def close(self) -> None:
        self._release()
        super().close()

    def __del__(self) -> None:
        if hasattr(self, "_calls"):
            self._release()

    def _release(self) -> None:
        for call in list(self._calls):
            call.release()
        if self._native is not None:
            self.library.release("Session", self._native)
            self._native = None
        for value in self._values:
            self.library.release("Value", value)
        self._values = []


class PackedOnceCall(WholeCall):
    """Bindings of one session."""

    def __init__(self, session: PackedOnceSession) -> None:
        self._session = session
        self._binding: int | None = session.library.made("CreateIoBinding", session.native)
        self._kept: list[Any] = []

    def bind_input(self, name: str, buffer: Buffer) -> None:
        self._bind("BindInput", name, buffer)

    def bind_output(self, name: str, buffer: Buffer) -> None:
        self._bind("BindOutput", name, buffer)

    def _bind(self, function: str, name: str, buffer: Buffer) -> None:
        library = self._session.library
        value = library.tensor(buffer.address, buffer.nbytes, buffer.shape, ELEMENTS[buffer.dtype][1])
        library.call(function, self._binding, name.encode(), value)
        library.release("Value", value)  # the binding has a reference of its own
        self._kept.append(buffer)

    def prepare(self) -> None:
        """Nothing: the first run is like the others."""

    def run(self) -> None:
        started = time.perf_counter()
        try:
            self._session.library.call("RunWithBinding", self._session.native, None, self._binding)
        except OnnxRuntimeFailure as error:
            raise BundleError(
                "ONNX Runtime failed while running the graph",
                got=str(error).strip().splitlines()[0],
                fix="If memory ran out, load with a smaller {max_context}; otherwise run `qwen-export check` on the bundle.",
            ) from error
        finally:
            self._session.busy_s += time.perf_counter() - started

    def release(self) -> None:
        if self._binding is not None:
            self._session.library.release("IoBinding", self._binding)
            self._binding = None

    def __del__(self) -> None:
        if hasattr(self, "_binding"):
            self.release()
