"""Device memory through the CUDA runtime that ONNX Runtime has loaded already: allocate, copy, pin. Nothing else is needed of it."""

from __future__ import annotations

import ctypes
from functools import cache

from qwen_export.errors import BundleError

_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so", "cudart64_13.dll", "cudart64_12.dll")
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3


@cache
def _runtime() -> ctypes.CDLL:
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        library.cudaMalloc.argtypes = [ctypes.POINTER(pointer), size]
        library.cudaFree.argtypes = [pointer]
        library.cudaMemset.argtypes = [pointer, ctypes.c_int, size]
        library.cudaMemcpy.argtypes = [pointer, pointer, size, ctypes.c_int]
        library.cudaMemcpy2D.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int]
        library.cudaHostRegister.argtypes = [pointer, size, ctypes.c_uint]
        library.cudaHostUnregister.argtypes = [pointer]
        library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = [ctypes.c_int], ctypes.c_char_p
        return library
    raise BundleError(
        "the CUDA runtime library is not installed", got="none of " + ", ".join(_NAMES), fix="Install CUDA, or nvidia-cuda-runtime."
    )


def _call(name: str, *arguments: object) -> None:
    code = getattr(_runtime(), name)(*arguments)
    if code:
        text = _runtime().cudaGetErrorString(code).decode()
        raise BundleError(f"CUDA could not carry out {name}", got=text, fix="Is the device out of memory? Try a smaller --max-context.")


def allocate(nbytes: int) -> int:
    """Zeroed device memory; returns its address."""
    address = ctypes.c_void_p()
    _call("cudaMalloc", ctypes.byref(address), max(1, nbytes))
    _call("cudaMemset", address, 0, max(1, nbytes))
    return int(address.value or 0)


def free(address: int) -> None:
    _runtime().cudaFree(address)


def to_device(device: int, host: int, nbytes: int) -> None:
    _call("cudaMemcpy", device, host, nbytes, _HOST_TO_DEVICE)


def to_host(host: int, device: int, nbytes: int) -> None:
    _call("cudaMemcpy", host, device, nbytes, _DEVICE_TO_HOST)


def copy_rows(target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
    """Device to device: `height` rows of `width` bytes, whose starts are `pitch` bytes apart."""
    _call("cudaMemcpy2D", target, target_pitch, source, source_pitch, width, height, _DEVICE_TO_DEVICE)


def pin(host: int, nbytes: int) -> None:
    """Lock host memory, so that copies to and from it run at the speed of the bus."""
    _call("cudaHostRegister", host, nbytes, 0)


def unpin(host: int) -> None:
    _runtime().cudaHostUnregister(host)
