"""TensorRT's runtime with ONNX Runtime on the CPU behind it. An engine is an ONNX graph whose weights lie outside; `engine_bundle` makes
such a bundle of one for target onnx, so that the whole runtime can be driven without a GPU."""

from __future__ import annotations

import ctypes
import enum
import functools
import json
import shutil
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from qwen_export.manifest import MANIFEST, hash_file, load_manifest
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import FLAVOURS, Library
from tests.support.fake_driver import FakeDriver
from tests.support.manifests import write_raw

VERSION = "1.5.0.114"
_TYPES = {1: "FLOAT", 10: "HALF", 6: "INT32", 7: "INT64"}
_NUMPY = {1: np.float32, 10: np.float16, 6: np.int32, 7: np.int64}


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = range(2)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class Allocation(enum.Enum):
    STATIC, USER_MANAGED = range(2)


class Invalid(enum.IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC, MALFORMED_ENGINE = 1, 2, 32


def engine_bundle(bundle: Path, output: Path, weights: str = "inputs", **engine: object) -> Path:
    """A copy of a bundle for target onnx that says it is for TensorRT-RTX. `weights`: "inputs", "stripped", "streamed" or "refused";
    further arguments change the manifest's `engine`."""
    shutil.copytree(bundle, output)
    manifest = json.loads((output / MANIFEST).read_text())
    for graph in {spec["file"] for spec in manifest["graphs"].values()}:
        model = onnx.load(output / graph, load_external_data=False)
        model.metadata_props.add(key="weights", value=weights)
        onnx.save(model, output / graph)
        entry = hash_file(output / graph)
        manifest["files"][graph] = {"size": entry.size, "sha256": entry.sha256}
    manifest["target"] |= {"backend": "tensorrt-rtx", "device": "cuda", "minimum_backend": VERSION}
    manifest["engine"] = {"version": VERSION, "sms": ["89"], "minimum_cuda": "12.0", **engine}
    write_raw(output, json.dumps(manifest))
    load_manifest(output)
    return output


class FakeTensorRT:
    """`recordable`: whether contexts may be recorded. `live` counts objects by kind, `order` has the kinds in the order they went."""

    def __init__(self, driver: FakeDriver, *, recordable: bool = True, version: str = VERSION) -> None:
        self.driver, self.recordable, self.version = driver, recordable, version
        self.live = {"runtime": 0, "engine": 0, "context": 0}
        self.order: list[str] = []
        self.refitted_from: set[TensorLocation] = set()
        """Where the weights lay that refitters were given."""
        self.budgets: list[int] = []
        """Bytes on the GPU of weights that engines stream, engine by engine."""
        self.compiled = 0
        """Kernels that contexts had to compile, because the runtime cache did not have them."""

    def library(self) -> Library:
        log = SimpleNamespace(errors=[])
        api = SimpleNamespace(
            __version__=self.version,
            Runtime=lambda log: _Runtime(self, log),
            Refitter=_Refitter,
            Weights=lambda kind, address, count: (kind, address, count),
            TensorIOMode=TensorIOMode,
            TensorLocation=TensorLocation,
            ExecutionContextAllocationStrategy=Allocation,
            EngineInvalidityDiagnostics=Invalid,
            DataType=SimpleNamespace(**{name: SimpleNamespace(name=name) for name in _TYPES.values()}),
        )
        return Library(FLAVOURS["tensorrt-rtx"], api, self.version, log)


class _Object:
    kind = ""

    def __init__(self, world: FakeTensorRT) -> None:
        self.world = world
        world.live[self.kind] += 1

    def __del__(self) -> None:
        if hasattr(self, "world"):
            self.world.live[self.kind] -= 1
            self.world.order.append(self.kind)


class _Runtime(_Object):
    kind = "runtime"

    def __init__(self, world: FakeTensorRT, log: Any) -> None:
        super().__init__(world)
        self._log = log

    def deserialize_cuda_engine(self, data: Any) -> _Engine | None:
        model = onnx.load_from_string(bytes(data))
        weights = {entry.key: entry.value for entry in model.metadata_props}["weights"]
        if weights == "refused":
            self._log.errors.append("IRuntime::deserializeCudaEngine: Error Code 1")
            return None
        return _Engine(self.world, model, weights)

    def get_engine_validity(self, data: Any) -> tuple[str, int]:
        return "INVALID", Invalid.UNSUPPORTED_CC


class _Tensor:
    def __init__(self, value: Any) -> None:
        self.type = value.type.tensor_type.elem_type
        self.shape = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)


class _Engine(_Object):
    kind = "engine"
    device_memory_size_v2 = 4096

    def __init__(self, world: FakeTensorRT, model: onnx.ModelProto, weights: str) -> None:
        super().__init__(world)
        self.model, self.refittable = model, weights in ("stripped", "streamed")
        self.weights = {t.name: t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        self.given: dict[str, int] = {}
        self.refitted: dict[str, npt.NDArray[Any]] = {}
        self.inputs = {value.name: _Tensor(value) for value in model.graph.input}
        self.outputs = {value.name: _Tensor(value) for value in model.graph.output}
        self.bound = {} if self.refittable else self.weights
        self.streamable_weights_size = 1000 if weights == "streamed" else 0
        self._budget = 0
        self._names = [*self.inputs, *self.outputs, *self.bound]
        self.num_io_tensors = len(self._names)

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, nbytes: int) -> None:
        assert not self.world.live["context"], "before there are contexts"
        self._budget = nbytes
        self.world.budgets.append(nbytes)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.OUTPUT if name in self.outputs else TensorIOMode.INPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.inputs | self.outputs)[name].shape

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_TYPES[(self.inputs | self.outputs)[name].type])

    def create_runtime_config(self) -> _Config:
        return _Config()

    def create_execution_context(self, runtime_config: _Config) -> _Context:
        if not runtime_config.cache.data:
            self.world.compiled += 1
            runtime_config.cache.data = b"kernels"
        return _Context(self)


class _Config:
    def set_execution_context_allocation_strategy(self, strategy: Allocation) -> None:
        assert strategy is Allocation.USER_MANAGED

    def create_runtime_cache(self) -> _Cache:
        return _Cache()

    def set_runtime_cache(self, cache: _Cache) -> None:
        self.cache = cache


class _Cache:
    data = b""

    def serialize(self) -> bytes:
        return self.data

    def deserialize(self, data: bytes) -> bool:
        self.data = data
        return True


class _Refitter:
    def __init__(self, engine: _Engine, log: Any) -> None:
        self._engine = engine

    def get_missing_weights(self) -> list[str]:
        return [name for name in self._engine.weights if name not in self._engine.given]

    def set_named_weights(self, name: str, weights: tuple[Any, int, int], location: TensorLocation) -> bool:
        tensor, world = self._engine.weights[name], self._engine.world
        kind, address, count = weights
        if location is TensorLocation.DEVICE:
            world.driver.check(address, count * np.dtype(_NUMPY[tensor.data_type]).itemsize)
        world.refitted_from.add(location)
        self._engine.given[name] = address
        return bool(kind.name == _TYPES[tensor.data_type] and count == prod(tensor.dims))

    def refit_cuda_engine(self) -> bool:
        copies = {}
        for name, address in self._engine.given.items():
            copies[name] = _array(address, self._engine.weights[name].data_type, tuple(self._engine.weights[name].dims)).copy()
        self._engine.refitted = copies
        return True


class _Context(_Object):
    kind = "context"

    def __init__(self, engine: _Engine) -> None:
        super().__init__(engine.world)
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._session: ort.InferenceSession | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        self.world.driver.check(address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if set(self._addresses) != {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}:
            return False
        if self.world.driver.is_recording(stream) and not self.world.recordable:
            return False
        self.world.driver.queue(stream, self._run)
        return True

    def _run(self) -> None:
        engine = self._engine
        if self._session is None:
            self._session = self._compile()
        feed = {name: self._tensor(name, tensor).copy() for name, tensor in engine.inputs.items()}
        results = self._session.run(list(engine.outputs), feed)
        for (name, tensor), result in zip(engine.outputs.items(), results, strict=True):
            self._tensor(name, tensor)[...] = result

    def _tensor(self, name: str, tensor: _Tensor) -> npt.NDArray[Any]:
        array = _array(self._addresses[name], tensor.type, tensor.shape)
        self.world.driver.check(self._addresses[name], array.nbytes)
        return array

    def _compile(self) -> ort.InferenceSession:
        engine = self._engine
        model = onnx.ModelProto()
        model.CopyFrom(engine.model)
        for weight in model.graph.initializer:
            if weight.name not in engine.weights:
                continue
            if weight.name in self._addresses:
                array = _array(self._addresses[weight.name], weight.data_type, tuple(weight.dims))
                self.world.driver.check(self._addresses[weight.name], array.nbytes)
            else:
                array = engine.refitted[weight.name]
            weight.ClearField("external_data")
            weight.data_location = onnx.TensorProto.DEFAULT
            weight.raw_data = array.tobytes()
        return _session(model.SerializeToString())


@functools.lru_cache(maxsize=32)
def _session(model: bytes) -> ort.InferenceSession:
    """Tests open the engines of one bundle again and again; a session keeps nothing of its runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _array(address: int, kind: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    dtype = np.dtype(_NUMPY[kind])
    raw = (ctypes.c_uint8 * (prod(shape) * dtype.itemsize)).from_address(address)
    return np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
