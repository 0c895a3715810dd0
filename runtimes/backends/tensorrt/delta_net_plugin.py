"""The decode and verify step of a DeltaNet layer inside engines of TensorRT-RTX: an IPluginV3 that launches one kernel with the driver.

Everything it needs is in its fields, and these are in the engine: the kernel's name, its PTX, and the sizes. The full TensorRT has the same
kernel as a quick-deployable plugin, for which a runtime needs nothing (plugins/tensorrt/quick_plugin.py).
"""

from __future__ import annotations

import base64
import ctypes
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np

from qwen_export.errors import BundleError
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import Library
from qwen_export.runtimes.memory import cuda_driver

NAMESPACE, VERSION = "qwen", "1"
STEP, VERIFY = "DeltaNetStep", "DeltaNetVerify"
ACTIVATION, FLOAT, COUNT = "activation", "FLOAT", "INT32"
_STEP_TENSORS = {
    "packed": ACTIVATION,
    "conv": ACTIVATION,
    "a_log": FLOAT,
    "dt_bias": FLOAT,
    "norm": ACTIVATION,
    "history": ACTIVATION,
    "state": FLOAT,
}
TENSORS = {STEP: _STEP_TENSORS, VERIFY: _STEP_TENSORS | {"pending": ACTIVATION, "accepted": COUNT, "commit": COUNT}}
"""Inputs of the plugins, in order: ACTIVATION, or a type of their own whatever the activations are, as tensorrt.DataType calls it."""
RESULTS = {"y": ACTIVATION, "history": ACTIVATION, "state": FLOAT}
OWN = frozenset((NAMESPACE, name) for name in TENSORS)
"""Domains and kinds of our nodes."""
_PACKED, _HISTORY, _STATE = (list(_STEP_TENSORS).index(name) for name in ("packed", "history", "state"))
THREADS = 512
"""Of a block, which is one value head."""


@dataclass(frozen=True)
class StepFields:
    """Attributes of a node, fields of a plugin. `kernel` is a function of `ptx` (base64 of its deflated text); `tokens` are read by a call,
    `pending_rows` may be replayed before; `head_size` is Dk and Dv; `eps` has the bits of a float."""

    kernel: str
    ptx: str
    tokens: int
    pending_rows: int
    key_heads: int
    value_heads: int
    head_size: int
    eps: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the kernel takes between the pointers of its inputs and those of its outputs."""
        return (self.tokens, self.pending_rows, self.key_heads, self.value_heads, self.eps)

    @property
    def width(self) -> int:
        """Of y."""
        return self.value_heads * self.head_size


@cache
def pack_ptx(ptx: bytes) -> str:
    """Every layer of a graph carries the same."""
    return base64.b64encode(zlib.compress(ptx, 9)).decode("ascii")


def unpack_ptx(packed: str) -> bytes:
    return zlib.decompress(base64.b64decode(packed))


def _function(given: StepFields) -> int:
    """The kernel, on the device that the calling thread works on."""
    return _loaded(given.ptx, given.kernel, cuda_driver.current_context())


@cache
def _loaded(packed_ptx: str, kernel: str, context: int) -> int:
    """A function belongs to one context. The driver compiles the PTX, and keeps that on the disk."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    cuda_driver.call(
        "cuModuleLoadData",
        ctypes.byref(module),
        unpack_ptx(packed_ptx) + b"\0",
        fix="Run `qwen-export check`: the driver must serve the CUDA that the manifest names.",
    )
    cuda_driver.call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
    return int(function.value or 0)


def launch(given: StepFields, inputs: Sequence[int], outputs: Sequence[int], stream: int) -> None:
    """Queue the kernel on a stream. `inputs` and `outputs` are addresses on the device, in the order of TENSORS and RESULTS."""
    pointers = [*map(ctypes.c_void_p, inputs), *map(ctypes.c_int, given.numbers), *map(ctypes.c_void_p, outputs)]
    arguments = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(pointer) for pointer in pointers))
    grid_and_block = (given.value_heads, 1, 1, THREADS, 1, 1)
    cuda_driver.call("cuLaunchKernel", _function(given), *grid_and_block, 0, stream, arguments, None)


def register(library: Library) -> None:
    """Make the plugins known to a TensorRT-RTX, for its parser and for engines that hold them. Raises BundleError where it refuses."""
    registry = library.api.get_plugin_registry()
    for name in TENSORS:
        if registry.get_creator(name, VERSION, NAMESPACE) is not None:
            continue
        creator = _creator(library.api, name)
        if not registry.register_creator(creator, NAMESPACE):
            raise BundleError(
                f"{library.flavour.name} does not take our plugin {name}",
                got=library.take_messages() or "no reason",
                fix="Install the version of the library that the bundle was built with, as `qwen-export inspect` shows it.",
            )
        _creators.append(creator)


_creators: list[Any] = []  # the registry holds no reference


def _creator(api: Any, name: str) -> Any:
    class Creator(api.IPluginCreatorV3One):
        def __init__(self) -> None:
            api.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = name, NAMESPACE, VERSION
            self.field_names, self.data = _collection(api, StepFields("", "", 0, 0, 0, 0, 0, 0))

        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
            return step_plugin(api, self.name, read_fields(collection))

    return Creator()


def step_plugin(api: Any, name: str, given: StepFields) -> Any:
    """An IPluginV3 of the library `api`."""

    class Plugin(api.IPluginV3, api.IPluginV3OneCore, api.IPluginV3OneBuild, api.IPluginV3OneRuntime):
        def __init__(self) -> None:
            for base in (api.IPluginV3, api.IPluginV3OneCore, api.IPluginV3OneBuild, api.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = name, NAMESPACE, VERSION
            self.num_outputs = len(RESULTS)
            self.kept, self.data = _collection(api, given)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def get_output_data_types(self, types: list[Any]) -> list[Any]:
            return [types[_PACKED], types[_HISTORY], types[_STATE]]

        def get_output_shapes(self, shapes: list[Any], shape_inputs: list[Any], build: Any) -> list[Any]:
            packed = shapes[_PACKED]
            y = api.DimsExprs([packed[0], packed[1], build.constant(given.width)])
            return [y, api.DimsExprs(shapes[_HISTORY]), api.DimsExprs(shapes[_STATE])]

        def supports_format_combination(self, position: int, tensors: list[Any], inputs: int) -> bool:
            types, found, activation = api.DataType, tensors[position].desc, tensors[_PACKED].desc.type
            wanted = [*TENSORS[name].values(), *RESULTS.values()][position]
            if found.format != api.TensorFormat.LINEAR or activation not in (types.FLOAT, types.HALF, types.BF16):
                return False
            return bool(found.type == (activation if wanted == ACTIVATION else getattr(types, wanted)))

        def configure_plugin(self, inputs: list[Any], outputs: list[Any]) -> None:
            return None

        def on_shape_change(self, inputs: list[Any], outputs: list[Any]) -> None:
            return None

        def get_fields_to_serialize(self) -> Any:
            return self.kept

        def attach_to_context(self, context: Any) -> Any:
            _function(given)  # not in the first call, which may be one that is recorded
            return self.clone()

        def enqueue(self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int) -> int:
            launch(given, inputs, outputs, stream)
            return 0

        def set_tactic(self, tactic: int) -> None:
            return None

        def clone(self) -> Any:
            return Plugin()

    return Plugin()


def _collection(api: Any, given: StepFields) -> tuple[Any, list[Any]]:
    """The fields for TensorRT, and what they point to: that must live as long as they do."""
    kinds, values = api.PluginFieldType, [getattr(given, field.name) for field in fields(StepFields)]
    data = [value.encode("ascii") if isinstance(value, str) else np.array([value], np.int32) for value in values]
    made = [
        api.PluginField(field.name, value, kinds.CHAR if isinstance(value, bytes) else kinds.INT32)
        for field, value in zip(fields(StepFields), data, strict=True)
    ]
    return api.PluginFieldCollection(made), [made, data]


def read_fields(collection: Any) -> StepFields:
    values: dict[str, Any] = {}
    for field in collection:
        data = np.asarray(field.data)
        kind = StepFields.__dataclass_fields__[field.name].type
        values[field.name] = data.tobytes().rstrip(b"\0").decode("ascii") if kind == "str" else int(data.reshape(-1)[0])
    return StepFields(**values)
