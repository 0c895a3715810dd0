"""The NVIDIA driver, by ctypes. Every machine with a GPU has it, so memory and CUDA graphs need no other library.

Every use of a device in a process shares the device's primary context, as ONNX Runtime and TensorRT do; memory of one is memory of all.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_void_p
from functools import cache
from typing import Any

from qwen_export.errors import BundleError

LIBRARY_NAMES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1",)
OUT_OF_MEMORY = 2
_NO_DEVICE = 100
_ENABLED_BEFORE = 704  # CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED
_MAJOR, _MINOR = 75, 76  # attributes of a device: compute capability
VIRTUAL_MEMORY = 102
"""The attribute that tells whether pages of memory can be mapped."""


class Copy2D(Structure):
    """CUDA_MEMCPY2D of the driver's header, for copies from device to device."""

    _fields_ = [
        (f"{side}{name}", kind)
        for side in ("src", "dst")
        for name, kind in (
            ("XInBytes", c_size_t),
            ("Y", c_size_t),
            ("MemoryType", c_uint),
            ("Host", c_void_p),
            ("Device", c_ulonglong),
            ("Array", c_void_p),
            ("Pitch", c_size_t),
        )
    ] + [("WidthInBytes", c_size_t), ("Height", c_size_t)]


# Arguments by function. Addresses on the device are 64 bits wide, streams, contexts and graphs are pointers.
FUNCTIONS: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceTotalMem_v2": [POINTER(c_size_t), c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuCtxGetCurrent": [POINTER(c_void_p)],
    "cuCtxSetCurrent": [c_void_p],
    "cuMemGetInfo_v2": [POINTER(c_size_t), POINTER(c_size_t)],
    "cuMemAlloc_v2": [POINTER(c_ulonglong), c_size_t],
    "cuMemFree_v2": [c_ulonglong],
    "cuMemsetD8Async": [c_ulonglong, c_ubyte, c_size_t, c_void_p],
    "cuMemcpyHtoDAsync_v2": [c_ulonglong, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_ulonglong, c_size_t, c_void_p],
    "cuMemcpyDtoDAsync_v2": [c_ulonglong, c_ulonglong, c_size_t, c_void_p],
    "cuMemcpy2DUnaligned_v2": [POINTER(Copy2D)],
    "cuMemcpyPeerAsync": [c_ulonglong, c_void_p, c_ulonglong, c_void_p, c_size_t, c_void_p],
    "cuDeviceCanAccessPeer": [POINTER(c_int), c_int, c_int],
    "cuCtxEnablePeerAccess": [c_void_p, c_uint],
    "cuMemGetAllocationGranularity": [POINTER(c_size_t), c_void_p, c_int],
    "cuMemAddressReserve": [POINTER(c_ulonglong), c_size_t, c_size_t, c_ulonglong, c_ulonglong],
    "cuMemAddressFree": [c_ulonglong, c_size_t],
    "cuMemCreate": [POINTER(c_ulonglong), c_size_t, c_void_p, c_ulonglong],
    "cuMemRelease": [c_ulonglong],
    "cuMemMap": [c_ulonglong, c_size_t, c_size_t, c_ulonglong, c_ulonglong],
    "cuMemUnmap": [c_ulonglong, c_size_t],
    "cuMemSetAccess": [c_ulonglong, c_size_t, c_void_p, c_size_t],
    "cuMemHostAlloc": [POINTER(c_void_p), c_size_t, c_uint],
    "cuMemFreeHost": [c_void_p],
    "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
    "cuMemHostUnregister": [c_void_p],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuEventCreate": [POINTER(c_void_p), c_uint],
    "cuEventDestroy_v2": [c_void_p],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuStreamBeginCapture_v2": [c_void_p, c_int],
    "cuStreamEndCapture": [c_void_p, POINTER(c_void_p)],
    "cuGraphInstantiateWithFlags": [POINTER(c_void_p), c_void_p, c_ulonglong],
    "cuGraphDestroy": [c_void_p],
    "cuGraphExecDestroy": [c_void_p],
    "cuGraphLaunch": [c_void_p, c_void_p],
    "cuModuleLoadData": [POINTER(c_void_p), c_char_p],
    "cuModuleGetFunction": [POINTER(c_void_p), c_void_p, c_char_p],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p],
}
_thread = threading.local()
_several: set[int] = set()  # devices other than the first that were used


@cache
def driver() -> Any:
    """The driver's library. Raises BundleError where there is no driver, an old one, or no GPU."""
    library = load_driver()
    try:
        for name, arguments in FUNCTIONS.items():
            getattr(library, name).argtypes = arguments
    except AttributeError as error:
        raise BundleError("the NVIDIA driver is too old", got=error, expected="one for CUDA 12 or newer", fix="Update it.") from error
    code = library.cuInit(0)
    if code:
        what = "the NVIDIA driver sees no GPU" if code == _NO_DEVICE else "the NVIDIA driver cannot be used"
        raise BundleError(
            what, got=_text(library, code), fix="See whether `nvidia-smi` lists a GPU; a container must be started with GPUs."
        )
    return library


def load_driver() -> Any:
    """The shared library, without a look at its functions."""
    for name in LIBRARY_NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BundleError(
        "this machine has no NVIDIA driver",
        got=f"{' or '.join(LIBRARY_NAMES)} cannot be loaded",
        fix="Install the driver, or build the checkpoint for {device} cpu.",
    )


def forget_driver() -> None:
    """Load the driver again at its next use. The calling thread has no device until then."""
    for forget in (*at_forgetting, connect.cache_clear, _primary_context.cache_clear, driver.cache_clear):
        forget()
    _thread.ready = False


at_forgetting: list[Callable[[], None]] = []
"""What gives up things of the driver that other modules keep."""


def call(name: str, *arguments: object, fix: str = "") -> None:
    """Call a function of the driver. Raises BundleError with the driver's message."""
    code = getattr(driver(), name)(*arguments)
    if code:
        raise failure(name, code, fix)


def failure(name: str, code: int, fix: str = "") -> BundleError:
    """The error for a function of the driver that has returned `code`."""
    return BundleError(f"CUDA could not carry out {name}", got=_text(driver(), code), fix=fix)


def ensure_context() -> None:
    """Give the calling thread the first device, unless it has one already."""
    if getattr(_thread, "ready", False):
        return
    current = c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(current))
    if not current.value:
        call("cuCtxSetCurrent", _primary_context(0))
    _thread.ready = True


def current_context() -> int:
    """The calling thread's, which is that of the first device unless it has another already."""
    ensure_context()
    current = c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(current))
    return int(current.value or 0)


def use_device(device_id: int) -> None:
    """Make a device the one that the calling thread works on.

    As long as a process uses the first device only, its threads have that one since their first call, and a step need not name it some ten
    times. Once another one is used, every operation does: a backend may have changed the thread's device in between."""
    if not device_id and not _several:
        ensure_context()
        return
    _several.add(device_id)
    call("cuCtxSetCurrent", _primary_context(device_id))
    _thread.ready = True


@cache
def connect(device_id: int, other_id: int) -> tuple[int, int]:
    """The contexts of two devices, for copies between them: direct ones, where the machine can. Leaves the first device in use."""
    mine, theirs, direct = _primary_context(device_id), _primary_context(other_id), c_int()
    call("cuDeviceCanAccessPeer", ctypes.byref(direct), _device(device_id), _device(other_id))
    use_device(device_id)
    if direct.value:
        code = driver().cuCtxEnablePeerAccess(theirs, 0)
        if code not in (0, _ENABLED_BEFORE):
            raise BundleError(
                "two GPUs cannot be connected",
                got=f"devices {device_id} and {other_id}: {error_text(code)}",
                fix="Load with other {devices}, or end other programs that use them.",
            )
    return mine, theirs


@cache
def _primary_context(device_id: int) -> int:
    """Kept until the process ends, as every other user of the device in the process keeps it."""
    context = c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), _device(device_id))
    return int(context.value or 0)


def device_count() -> int:
    count = c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    return count.value


def total_memory(device_id: int = 0) -> int:
    """All bytes of a device. Unlike `memory_info`, this makes no context, which takes memory and time."""
    total = c_size_t()
    call("cuDeviceTotalMem_v2", ctypes.byref(total), _device(device_id))
    return total.value


def _device(device_id: int) -> int:
    count, device = device_count(), c_int()
    if not 0 <= device_id < count:
        raise BundleError("there is no such GPU", got=f"device {device_id}", expected=f"0 to {count - 1}", fix="Change {device_id}.")
    call("cuDeviceGet", ctypes.byref(device), device_id)
    return device.value


def device_name(device_id: int = 0) -> str:
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, len(name), _device(device_id))
    return name.value.decode(errors="replace")


def compute_capability(device_id: int = 0) -> tuple[int, int]:
    """Major and minor number of a device, (8, 9) for SM 89."""
    return attribute(_MAJOR, device_id), attribute(_MINOR, device_id)


def attribute(number: int, device_id: int = 0) -> int:
    """An attribute of a device, by its number in the driver's header."""
    value = c_int()
    call("cuDeviceGetAttribute", ctypes.byref(value), number, _device(device_id))
    return value.value


def driver_version() -> tuple[int, int]:
    """The newest CUDA that the driver serves, (13, 0)."""
    version = c_int()
    call("cuDriverGetVersion", ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def memory_info() -> tuple[int, int]:
    """Free and total bytes of the calling thread's device."""
    ensure_context()
    free, total = c_size_t(), c_size_t()
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def error_text(code: int) -> str:
    return _text(driver(), code)


def _text(library: Any, code: int) -> str:
    text = c_char_p()
    library.cuGetErrorString(code, ctypes.byref(text))
    return f"{text.value.decode(errors='replace')} ({code})" if text.value else f"error {code}"
