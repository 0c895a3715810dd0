"""ONNX Runtime's C interface, through ctypes, from the library that its Python package carries: for the one thing that its Python binding
leaves out, sessions that share what they pack (`packed_once_session.py`).

The interface is binary and fixed: a release only appends functions to its table. The places are compared with ONNX Runtime's headers in
tests/test_onnxruntime_abi.py."""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

API_VERSION = 18
"""The interface's version that is requested: that of ONNX Runtime 1.18, which has all of the functions below."""
_PACKS_ONCE = (1, 31)
"""The oldest ONNX Runtime that was seen to share the packed codes of MatMulNBits; older ones refuse such sessions."""
_FILES = {"win32": "onnxruntime.dll", "darwin": "libonnxruntime.*.dylib"}

_ARENA = 1
"""The kind of allocator that memory is said to be of."""

_OUT = POINTER(c_void_p)
FUNCTIONS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "GetErrorMessage": (2, (c_void_p,)),
    "CreateEnv": (3, (c_int, c_char_p, _OUT)),
    "DisableTelemetryEvents": (6, (c_void_p,)),
    "CreateSessionOptions": (10, (_OUT,)),
    "DisableMemPattern": (17, (c_void_p,)),
    "SetSessionLogSeverityLevel": (22, (c_void_p, c_int)),
    "SetIntraOpNumThreads": (24, (c_void_p, c_int)),
    "SetInterOpNumThreads": (25, (c_void_p, c_int)),
    "SessionGetInputCount": (30, (c_void_p, POINTER(c_size_t))),
    "SessionGetOutputCount": (31, (c_void_p, POINTER(c_size_t))),
    "SessionGetInputTypeInfo": (33, (c_void_p, c_size_t, _OUT)),
    "SessionGetOutputTypeInfo": (34, (c_void_p, c_size_t, _OUT)),
    "SessionGetInputName": (36, (c_void_p, c_size_t, c_void_p, _OUT)),
    "SessionGetOutputName": (37, (c_void_p, c_size_t, c_void_p, _OUT)),
    "CreateTensorWithDataAsOrtValue": (49, (c_void_p, c_void_p, c_size_t, POINTER(c_int64), c_size_t, c_int, _OUT)),
    "CastTypeInfoToTensorInfo": (55, (c_void_p, _OUT)),
    "GetTensorElementType": (60, (c_void_p, POINTER(c_int))),
    "GetDimensionsCount": (61, (c_void_p, POINTER(c_size_t))),
    "GetDimensions": (62, (c_void_p, POINTER(c_int64), c_size_t)),
    "CreateCpuMemoryInfo": (69, (c_int, c_int, _OUT)),
    "AllocatorFree": (76, (c_void_p, c_void_p)),
    "GetAllocatorWithDefaultOptions": (78, (_OUT,)),
    "ReleaseStatus": (93, (c_void_p,)),
    "ReleaseSession": (95, (c_void_p,)),
    "ReleaseValue": (96, (c_void_p,)),
    "ReleaseTypeInfo": (98, (c_void_p,)),
    "ReleaseSessionOptions": (100, (c_void_p,)),
    "AddSessionConfigEntry": (130, (c_void_p, c_char_p, c_char_p)),
    "RunWithBinding": (133, (c_void_p, c_void_p, c_void_p)),
    "CreateIoBinding": (134, (c_void_p, _OUT)),
    "ReleaseIoBinding": (135, (c_void_p,)),
    "BindInput": (136, (c_void_p, c_char_p, c_void_p)),
    "BindOutput": (137, (c_void_p, c_char_p, c_void_p)),
    "AddInitializer": (150, (c_void_p, c_char_p, c_void_p)),
    "CreateArenaCfgV2": (164, (POINTER(c_char_p), POINTER(c_size_t), c_size_t, _OUT)),
    "ReleaseArenaCfg": (157, (c_void_p,)),
    "CreateAndRegisterAllocator": (144, (c_void_p, c_void_p, c_void_p)),
    "CreatePrepackedWeightsContainer": (166, (_OUT,)),
    "ReleasePrepackedWeightsContainer": (167, (c_void_p,)),
    "CreateSessionFromArrayWithPrepackedWeightsContainer": (169, (c_void_p, c_char_p, c_size_t, c_void_p, c_void_p, _OUT)),
    "AddExternalInitializers": (210, (c_void_p, POINTER(c_char_p), _OUT, c_size_t)),
}
"""The functions in use: place in the table, and parameters."""


class OnnxRuntimeFailure(Exception):
    """What ONNX Runtime reported."""


class OnnxRuntimeLibrary:
    """The functions by name, over one environment. Handles are addresses."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.OrtGetApiBase.restype = POINTER(c_void_p)
        get_api = ctypes.CFUNCTYPE(POINTER(c_void_p), c_uint32)(library.OrtGetApiBase()[0])
        table = get_api(API_VERSION)
        self._library = library
        self._functions = {
            name: ctypes.CFUNCTYPE(_result(name), *parameters)(table[place]) for name, (place, parameters) in FUNCTIONS.items()
        }
        self._env = self.made("CreateEnv", 4, b"qwen-export")  # 4: failures arrive as exceptions
        self.call("DisableTelemetryEvents", self._env)  # nothing leaves the machine
        self._host = self.made("CreateCpuMemoryInfo", _ARENA, 0)
        self._share_arena()
        self.allocator = self.made("GetAllocatorWithDefaultOptions")

    def _share_arena(self) -> None:
        """One arena for the activations of all sessions, which take turns. It grows by what is requested for (strategy 1)."""
        arena = self.made("CreateArenaCfgV2", (c_char_p * 1)(b"arena_extend_strategy"), (c_size_t * 1)(1), 1)
        self.call("CreateAndRegisterAllocator", self._env, self._host, arena)
        self.release("ArenaCfg", arena)

    @property
    def env(self) -> int:
        return self._env

    def call(self, name: str, *arguments: Any) -> None:
        """Raises OnnxRuntimeFailure where the function returns a status."""
        status = self._functions[name](*arguments)
        if status:
            message = self._functions["GetErrorMessage"](status).decode(errors="replace")
            self._functions["ReleaseStatus"](status)
            raise OnnxRuntimeFailure(message)

    def made(self, name: str, *arguments: Any) -> int:
        """The handle that a function leaves at its last parameter."""
        out = c_void_p()
        self.call(name, *arguments, ctypes.byref(out))
        return out.value or 0

    def release(self, name: str, handle: int) -> None:
        self._functions[f"Release{name}"](handle)

    def tensor(self, address: int, nbytes: int, shape: tuple[int, ...], element: int) -> int:
        """A value over memory of the caller's."""
        return self.made("CreateTensorWithDataAsOrtValue", self._host, address, nbytes, (c_int64 * len(shape))(*shape), len(shape), element)


def _result(name: str) -> Any:
    if name == "GetErrorMessage":
        return c_char_p
    return None if name.startswith("Release") else c_void_p


@cache
def packing_library() -> OnnxRuntimeLibrary | None:
    """The library of the installed ONNX Runtime, None where there is none whose sessions share what they pack."""
    import onnxruntime as ort

    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < _PACKS_ONCE:
        return None
    files = sorted((Path(ort.__file__).parent / "capi").glob(_FILES.get(sys.platform, "libonnxruntime.so.*")))
    return OnnxRuntimeLibrary(files[0]) if files else None
