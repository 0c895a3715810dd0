"""ONNX Runtime's Python module as onnxruntime-directml has it on Windows, over another machine: the runtime's own code runs against it.

It takes what the runtime calls and nothing else, refuses what DirectML's binding refuses, and writes down what it was asked."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol
from unittest import mock

import numpy as np
import onnx
import onnxruntime as real
from onnx import helper

from tests.support.standard_graphs import Array

PROVIDER = "DmlExecutionProvider"


class Tensor(Protocol):
    """Memory of the device."""

    def write(self, array: Array) -> None: ...
    def read(self) -> Array: ...
    def drop(self) -> None: ...


class Machine(Protocol):
    """What executes. `run` gets all inputs and outputs of a session by name; outputs are written in place."""

    def tensor(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Tensor: ...
    def open(self, path: Path, entries: Mapping[str, str]) -> Any: ...
    def run(self, session: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None: ...
    def close(self, session: Any) -> None: ...


class Opened(NamedTuple):
    """A session as it was opened."""

    graph: str
    providers: tuple[Any, ...]
    entries: dict[str, str]
    settings: dict[str, Any]


class DirectmlBinding(ModuleType):
    """The module. `opened` and `bound` are what it was asked: sessions, and (graph, direction, name) of every binding."""

    __version__ = "1.24.4"
    ExecutionMode = real.ExecutionMode
    RunOptions = real.RunOptions

    def __init__(self, machine: Machine) -> None:
        super().__init__("onnxruntime")
        self.machine, self.opened, self.bound = machine, [], []
        self.devices: set[tuple[str, int]] = set()
        self.OrtValue = _Values(self)
        self.SessionOptions = _Options
        self.InferenceSession = lambda path, options, providers: _Session(self, path, options, providers)

    opened: list[Opened]
    bound: list[tuple[str, str, str]]

    def get_available_providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"]

    def disable_telemetry_events(self) -> None:
        pass

    @contextmanager
    def installed(self) -> Iterator[DirectmlBinding]:
        """Within it, `import onnxruntime` gives this module."""
        with mock.patch.dict(sys.modules, {"onnxruntime": self}):
            yield self


class _Options:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value

    def add_external_initializers(self, names: Sequence[str], values: Sequence[Any]) -> None:
        assert not names, "weights are read from the file beside the graph"


class _Values:
    def __init__(self, module: DirectmlBinding) -> None:
        self._module = module

    def ortvalue_from_numpy(self, array: Array, device: str, index: int) -> _Value:
        self._module.devices.add((device, index))
        return _Value(self._module.machine, array)


class _Value:
    def __init__(self, machine: Machine, array: Array) -> None:
        self.tensor, self._dtype, self._shape = machine.tensor(array.dtype, array.shape), array.dtype, array.shape
        weakref.finalize(self, self.tensor.drop)
        self.update_inplace(array)

    def numpy(self) -> Array:
        return self.tensor.read()

    def update_inplace(self, array: Array) -> None:
        assert array.flags.c_contiguous and array.dtype == self._dtype and array.shape == self._shape, "it copies bytes"
        self.tensor.write(array)


class _Session:
    def __init__(self, module: DirectmlBinding, path: str, options: _Options, providers: Sequence[Any]) -> None:
        settings = {key: value for key, value in vars(options).items() if key != "entries"}
        module.opened.append(Opened(Path(path).stem, tuple(providers), options.entries, settings))
        self._module, self._graph = module, Path(path).stem
        self._signature = onnx.load(path, load_external_data=False).graph
        self._handle = module.machine.open(Path(path), options.entries)
        weakref.finalize(self, module.machine.close, self._handle)

    def get_inputs(self) -> list[real.NodeArg]:
        weights = {weight.name for weight in self._signature.initializer}
        return [_argument(value) for value in self._signature.input if value.name not in weights]

    def get_outputs(self) -> list[real.NodeArg]:
        return [_argument(value) for value in self._signature.output]

    def io_binding(self) -> _Binding:
        return _Binding(lambda direction, name: self._module.bound.append((self._graph, direction, name)))

    def run_with_iobinding(self, binding: _Binding, options: real.RunOptions | None) -> None:
        self._module.machine.run(self._handle, binding.inputs, binding.outputs)


class _Binding:
    """Values only: memory of DirectML has no address."""

    def __init__(self, note: Callable[[str, str], None]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._note = note

    def bind_ortvalue_input(self, name: str, value: _Value) -> None:
        self._note("input", name)
        self.inputs[name] = value.tensor

    def bind_ortvalue_output(self, name: str, value: _Value) -> None:
        self._note("output", name)
        self.outputs[name] = value.tensor


class _Argument(NamedTuple):
    name: str
    type: str
    shape: list[int]


def _argument(value: onnx.ValueInfoProto) -> _Argument:
    kind = value.type.tensor_type
    element = {"float32": "float"}.get(name := str(helper.tensor_dtype_to_np_dtype(kind.elem_type)), name)
    return _Argument(value.name, f"tensor({element})", [dim.dim_value for dim in kind.shape.dim])


# Machines


class CpuMachine:
    """ONNX Runtime's CPU provider."""

    def tensor(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> HostTensor:
        return HostTensor(np.empty(shape, dtype))

    def open(self, path: Path, entries: Mapping[str, str]) -> real.InferenceSession:
        options = real.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        return real.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, session: real.InferenceSession, inputs: Mapping[str, HostTensor], outputs: Mapping[str, HostTensor]) -> None:
        results = session.run(list(outputs), {name: tensor.array for name, tensor in inputs.items()})
        for tensor, result in zip(outputs.values(), results, strict=True):
            tensor.write(result)

    def close(self, session: real.InferenceSession) -> None:
        pass


class HostTensor:
    def __init__(self, array: Array) -> None:
        self.array = array

    def write(self, array: Array) -> None:
        self.array[...] = array

    def read(self) -> Array:
        return self.array.copy()

    def drop(self) -> None:
        pass
