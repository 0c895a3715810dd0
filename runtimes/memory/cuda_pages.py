"""Addresses without memory, and pages of memory that are put behind them: the driver's virtual memory management.

A reserved range costs nothing. Its pages come and go one by one, and the addresses of what is there never change.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_ushort, c_void_p

from qwen_export.runtimes.memory import cuda_driver
from qwen_export.runtimes.memory.cuda_driver import call, use_device
from qwen_export.runtimes.memory.cuda_memory import require_memory

_PINNED, _ON_DEVICE, _READ_AND_WRITE, _MINIMUM = 1, 1, 3, 0


class Location(Structure):
    """CUmemLocation of the driver's header."""

    _fields_ = (("type", c_int), ("id", c_int))


class AllocationProperties(Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int),
        ("requestedHandleTypes", c_int),
        ("location", Location),
        ("win32HandleMetaData", c_void_p),
        ("compressionType", c_ubyte),
        ("gpuDirectRDMACapable", c_ubyte),
        ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    )


class Access(Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", c_uint))


def _properties(device_id: int) -> AllocationProperties:
    return AllocationProperties(type=_PINNED, location=Location(_ON_DEVICE, device_id))


def has_pages(device_id: int) -> bool:
    """Whether the device can map pages; some virtual GPUs cannot."""
    return bool(cuda_driver.attribute(cuda_driver.VIRTUAL_MEMORY, device_id))


def page_bytes(device_id: int) -> int:
    """Size of the smallest page."""
    use_device(device_id)
    size = c_size_t()
    call("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(_properties(device_id)), _MINIMUM)
    return size.value


def reserve(nbytes: int, device_id: int) -> int:
    """Reserve addresses, a multiple of the page size of them; returns the first one."""
    use_device(device_id)
    address = c_ulonglong()
    call("cuMemAddressReserve", ctypes.byref(address), nbytes, 0, 0, 0, fix="Load with a smaller {max_context}, or take fewer {slots}.")
    return int(address.value)


def give_back(address: int, nbytes: int) -> None:
    """End a reservation without pages."""
    cuda_driver.driver().cuMemAddressFree(address, nbytes)


def map_pages(address: int, nbytes: int, device_id: int) -> None:
    """Put zeroed memory, whole pages of it, behind reserved addresses. Raises BundleError where the GPU has too
    little. The zeros are queued on stream 0."""
    use_device(device_id)
    handle = c_ulonglong()
    code = cuda_driver.driver().cuMemCreate(ctypes.byref(handle), nbytes, ctypes.byref(_properties(device_id)), 0)
    require_memory(code, nbytes)
    try:
        call("cuMemMap", address, nbytes, 0, handle.value, 0)
    finally:  # the mapping keeps the memory
        cuda_driver.driver().cuMemRelease(handle.value)
    access = Access(Location(_ON_DEVICE, device_id), _READ_AND_WRITE)
    call("cuMemSetAccess", address, nbytes, ctypes.byref(access), 1)
    call("cuMemsetD8Async", address, 0, nbytes, 0)


def unmap_pages(address: int, nbytes: int) -> None:
    """Take the memory of one `map_pages` away again. No work on the device may use it."""
    cuda_driver.driver().cuMemUnmap(address, nbytes)
