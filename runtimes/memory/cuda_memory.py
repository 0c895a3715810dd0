"""Device memory: allocate, copy, pin. Copies return when they are done, those that end in `_later` when they are queued on their stream.

Memory is new when it is allocated, so its zeros are written on stream 0, which no call runs on, and waited for.
"""

from __future__ import annotations

import ctypes

from qwen_export.errors import BundleError
from qwen_export.runtimes.memory import cuda_driver
from qwen_export.runtimes.memory.cuda_driver import Copy2D, call

_DEVICE = 2  # CU_MEMORYTYPE_DEVICE
_SMALLER = "Load with a smaller {max_context}, or end other programs that use the GPU."


def allocate(nbytes: int, stream: int = 0) -> int:
    """Zeroed device memory; returns its address, a multiple of 256. Raises BundleError with what is free when there is too little."""
    address = allocate_raw(nbytes)
    call("cuMemsetD8Async", address, 0, max(1, nbytes), stream)
    call("cuStreamSynchronize", stream)
    return address


def allocate_raw(nbytes: int) -> int:
    """The same with whatever the memory holds."""
    cuda_driver.ensure_context()
    address = ctypes.c_ulonglong()
    code = cuda_driver.driver().cuMemAlloc_v2(ctypes.byref(address), max(1, nbytes))
    require_memory(code, nbytes)
    return int(address.value)


def require_memory(code: int, nbytes: int) -> None:
    """Raise BundleError where the driver has not given `nbytes` of memory; `code` is what it returned."""
    if code == cuda_driver.OUT_OF_MEMORY:
        free_bytes, total = cuda_driver.memory_info()
        raise BundleError(
            "the GPU has too little free memory",
            got=f"{_size(free_bytes)} free of {_size(total)}",
            expected=f"{_size(nbytes)} in one piece",
            fix=_SMALLER,
        )
    if code:
        raise BundleError(
            "the GPU gives no memory",
            got=cuda_driver.error_text(code),
            fix="Look at the GPU with `nvidia-smi`, and start this program again.",
        )


def zero_later(address: int, nbytes: int, stream: int) -> None:
    cuda_driver.ensure_context()
    call("cuMemsetD8Async", address, 0, nbytes, stream)


def wait() -> None:
    """For everything that was queued on stream 0."""
    call("cuStreamSynchronize", 0)


def free(address: int) -> None:
    cuda_driver.ensure_context()
    cuda_driver.driver().cuMemFree_v2(address)


def to_device(device: int, host: int, nbytes: int, stream: int = 0) -> None:
    to_device_later(device, host, nbytes, stream)
    call("cuStreamSynchronize", stream)


def to_host(host: int, device: int, nbytes: int, stream: int = 0) -> None:
    to_host_later(host, device, nbytes, stream)
    call("cuStreamSynchronize", stream)


def to_device_later(device: int, host: int, nbytes: int, stream: int) -> None:
    cuda_driver.ensure_context()
    if nbytes:
        call("cuMemcpyHtoDAsync_v2", device, host, nbytes, stream)


def to_host_later(host: int, device: int, nbytes: int, stream: int) -> None:
    cuda_driver.ensure_context()
    if nbytes:
        call("cuMemcpyDtoHAsync_v2", host, device, nbytes, stream)


def copy_later(target: int, source: int, nbytes: int, stream: int) -> None:
    """Device to device."""
    cuda_driver.ensure_context()
    if nbytes:
        call("cuMemcpyDtoDAsync_v2", target, source, nbytes, stream)


def copy_rows(target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
    """Device to device: `height` rows of `width` bytes, whose starts are `pitch` bytes apart; on stream 0."""
    cuda_driver.ensure_context()
    if not width or not height:
        return
    copy = Copy2D(WidthInBytes=width, Height=height)
    copy.srcMemoryType, copy.srcDevice, copy.srcPitch = _DEVICE, source, source_pitch
    copy.dstMemoryType, copy.dstDevice, copy.dstPitch = _DEVICE, target, target_pitch
    call("cuMemcpy2DUnaligned_v2", ctypes.byref(copy))
    wait()


def copy_between(target: int, target_device: int, source: int, source_device: int, nbytes: int, stream: int) -> None:
    """From one device to another, on a stream of the target's."""
    mine, theirs = cuda_driver.connect(target_device, source_device)
    cuda_driver.use_device(target_device)
    if nbytes:
        call("cuMemcpyPeerAsync", target, mine, source, theirs, nbytes, stream)
        call("cuStreamSynchronize", stream)


def pin(host: int, nbytes: int) -> None:
    """Lock host memory, so that copies to and from it run at the speed of the bus."""
    cuda_driver.ensure_context()
    call("cuMemHostRegister_v2", host, nbytes, 0)


def unpin(host: int) -> None:
    cuda_driver.ensure_context()
    cuda_driver.driver().cuMemHostUnregister(host)


def allocate_pinned(nbytes: int) -> int:
    """Host memory that is locked from the start; returns its address."""
    cuda_driver.ensure_context()
    address = ctypes.c_void_p()
    call("cuMemHostAlloc", ctypes.byref(address), max(1, nbytes), 0, fix="Is the machine out of memory?")
    return int(address.value or 0)


def free_pinned(host: int) -> None:
    cuda_driver.ensure_context()
    cuda_driver.driver().cuMemFreeHost(host)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.1f} MiB"
