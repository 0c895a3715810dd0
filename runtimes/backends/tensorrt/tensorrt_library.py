"""The one place that imports TensorRT: the full library or TensorRT-RTX, for the builder and for the runtime.

Both flavours have the same API, short of what `lacks` lists. Code that needs one of those calls `has`, never by the flavour's name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from functools import cache
from typing import Any

from qwen_export.errors import QwenExportError, UnsupportedError


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries. `modules` are the names it may be imported by, `packages` those it may be installed by; `lacks` maps what
    the other one has to the reason why this one has not."""

    name: str
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    minimum: str
    install: str
    lacks: dict[str, str]


# Capabilities, by the name that `Flavour.lacks` and `Library.has` use.
FOREIGN_SM = "foreign_sm"
"""Building for GPUs other than the one that is there, or without any."""
CUDA_GRAPH_STRATEGY = "cuda_graph_strategy"
"""The library records and replays CUDA graphs itself."""
RUNTIME_CACHE = "runtime_cache"
"""Kernels that the first call on a machine compiles can be kept in a file."""
TIMING_CACHE = "timing_cache"
"""Builds measure kernels on the GPU, and the measurements can be kept in a file."""
HARDWARE_COMPATIBILITY = "hardware_compatibility"
"""One engine for GPUs beyond those that it was built for."""
VERSION_COMPATIBILITY = "version_compatibility"
"""Engines that later versions of the library run."""
TILING = "tiling"
"""Builds may look for ways to cut products so that they stay in the L2 cache."""
AOT_PLUGINS = "aot_plugins"
"""Kernels of ours inside the engine, as PTX (quick-deployable plugins)."""
NATIVE_MOE = "native_moe"
"""IMoELayer has kernels, on SM 100 and 110."""
FP32_ATTENTION = "fp32_attention"
"""The attention layer takes fp32."""

FLAVOURS: dict[str, Flavour] = {
    flavour.name: flavour
    for flavour in (
        Flavour(
            "tensorrt",
            ("tensorrt",),
            ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
            "10.15",  # the first with TensorScatter, RMSNormalization and RotaryEmbedding
            "pip install tensorrt",
            {
                FOREIGN_SM: "an engine is for the GPU that it is built on, or with --hardware-compat for others like it",
                CUDA_GRAPH_STRATEGY: "calls are recorded by the program",
                RUNTIME_CACHE: "engines hold compiled kernels",
                FP32_ATTENTION: "the attention layer takes fp16 and bf16",
            },
        ),
        Flavour(
            "tensorrt-rtx",
            ("tensorrt_rtx", "tensorrt_rtx_bindings"),
            ("tensorrt_rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu12_bindings"),
            "1.5",
            "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
            {
                TIMING_CACHE: "kernels are chosen without measuring them and compiled on the machine that runs them",
                HARDWARE_COMPATIBILITY: "an engine is for the GPUs that {sms} lists, several at a time",
                VERSION_COMPATIBILITY: "each of its versions runs only the engines that it has built",
                TILING: "its compiler makes the same program at every level",
                AOT_PLUGINS: "there is no tensorrt.plugin package and no IPluginV3QuickAOTBuild",
                NATIVE_MOE: "IMoELayer parses and cannot be built for any of its GPUs",
                FP32_ATTENTION: "the attention layer has kernels for fp16 and bf16 only",
            },
        ),
    )
}

# Element types by their names in the manifest, as names of tensorrt.DataType.
DATA_TYPES = {
    "float": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
    "int4": "INT4",
    "float8e4m3fn": "FP8",
    "float4e2m1": "FP4",
}


@dataclass(frozen=True)
class Library:
    """An imported TensorRT. `api` is the module, whose classes have the same names in both flavours; `log` is what its objects report to,
    and must outlive them."""

    flavour: Flavour
    api: Any
    version: str
    log: Any

    def has(self, capability: str) -> bool:
        return capability not in self.flavour.lacks

    def data_type(self, dtype: str) -> Any:
        """tensorrt.DataType of an element type of the manifest."""
        return getattr(self.api.DataType, DATA_TYPES[dtype])

    def dtype(self, data_type: Any) -> str:
        """The manifest's name of a tensorrt.DataType."""
        return next(name for name, member in DATA_TYPES.items() if member == data_type.name)

    def take_messages(self) -> str:
        """Errors reported since the last call of this, in one line; the last ones are nearest to the cause."""
        messages = list(dict.fromkeys(self.log.errors))
        self.log.errors.clear()
        return "; ".join(" ".join(message.split())[:400] for message in messages[-3:])


@cache
def load_library(flavour: str) -> Library:
    """Import a flavour, "tensorrt" or "tensorrt-rtx". Raises UnsupportedError when it is not installed or too old."""
    wanted = FLAVOURS[flavour]
    for name in wanted.modules:
        try:
            api = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise _broken(wanted, error) from error
            continue
        except (ImportError, OSError, RuntimeError) as error:
            raise _broken(wanted, error) from error
        if numbers(api.__version__) < numbers(wanted.minimum):
            raise UnsupportedError(
                f"the installed {wanted.name} is too old",
                got=api.__version__,
                expected=f"at least {wanted.minimum}",
                fix=f"{wanted.install}.",
            )
        return Library(wanted, api, str(api.__version__), _logger(api))
    raise UnsupportedError(f"{wanted.name} is not installed", fix=f"{wanted.install}.")


def minimum_cuda(flavour: str) -> str:
    """The oldest CUDA that a driver must serve for the wheels that are installed: "12.0" or "13.0", by their names. Within a major version
    newer libraries run on older drivers."""
    installed = [package for package in FLAVOURS[flavour].packages if _is_installed(package)]
    old = any("cu12" in package for package in installed) and not any("cu13" in package for package in installed)
    return "12.0" if old else "13.0"


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers, to compare: "1.7.1.116" -> (1, 7, 1, 116)."""
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def _broken(flavour: Flavour, error: Exception) -> QwenExportError:
    return UnsupportedError(f"{flavour.name} is installed, and cannot be loaded", got=error, fix=f"{flavour.install}.")


def _logger(api: Any) -> Any:
    """An ILogger that keeps errors for the sentence that a failure is reported with."""

    class Log(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= api.ILogger.Severity.ERROR:
                self.errors.append(message)

    return Log()
