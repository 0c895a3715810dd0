# ruff: noqa: N802
"""The NVIDIA driver on host memory: what `runtimes.cuda_driver` calls, with the rules that a real one enforces.

Every address that is used must lie in a live allocation, whatever is freed must have been allocated, work queued while a stream records is
not carried out, and a failing allocation says so.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from qwen_export.runtimes.memory import cuda_driver

_OUT_OF_MEMORY, _INVALID_VALUE, _NO_DEVICE, _ILLEGAL_ADDRESS = 2, 1, 100, 700
_ALIGNMENT = 256
PAGE = 1 << 12
"""Size of the fake's pages."""
_POISON = 0xFF
"""The contents of addresses without memory: NaN as fp16, bf16 and fp32, which no kernel may take into a result."""


class _Function:
    argtypes: list[Any]

    def __init__(self, body: Callable[..., int]) -> None:
        self._body = body

    def __call__(self, *arguments: Any) -> int:
        assert len(arguments) == len(self.argtypes)
        return (
            self._body(*(getattr(a, "_obj", a.value if hasattr(a, "value") and not isinstance(a, ctypes.Array) else a) for a in arguments))
            or 0
        )


class FakeDriver:
    """One GPU of `memory` bytes. `allocated` are live pieces of device memory by address, `pinned` those of the host; `launches` counts
    recorded work that was started, `waits` how often the host has waited, `fault` is what the next waits return."""

    def __init__(self, memory: int = 1 << 30, sm: tuple[int, int] = (8, 9), cuda: int = 13000, devices: int = 1) -> None:
        self.memory, self.sm, self.cuda, self.devices = memory, sm, cuda, devices
        self._current = threading.local()
        self.allocated: dict[int, int] = {}
        self.pinned: dict[int, int] = {}
        self.streams: set[int] = set()
        self.events: set[int] = set()
        self.recordings: dict[int, list[Callable[[], None]]] = {}
        self.launches = self.waits = self.fault = 0
        self.connected: set[tuple[int | None, int]] = set()
        """Contexts that reach the memory of others: from, to."""
        self.owners: dict[int, int | None] = {}
        """The context that each piece of device memory was allocated in."""
        self.reserved: dict[int, int] = {}
        """Ranges of addresses, by the first one."""
        self.handles: dict[int, tuple[int, int]] = {}
        """Physical memory by handle: bytes, and how many mappings and owners it has."""
        self.mapped: dict[int, tuple[int, int]] = {}
        """Bytes and handle of what is behind reserved addresses."""
        self.modules: dict[int, bytes] = {}
        self.functions: dict[int, tuple[int, bytes]] = {}
        self.kernels: list[tuple[bytes, tuple[int, ...], Any]] = []
        """Kernels that were started: name, grid and block, and the array of pointers to arguments."""
        self.peak = 0
        self._recording: dict[int, list[Callable[[], None]]] = {}
        self._keep: dict[int, Any] = {}
        self._next = 1000
        for name in cuda_driver.FUNCTIONS:
            setattr(self, name, _Function(getattr(self, "_" + name.removesuffix("_v2"))))

    @property
    def context(self) -> int | None:
        """The calling thread's."""
        return getattr(self._current, "context", None)

    @context.setter
    def context(self, value: int | None) -> None:
        self._current.context = value

    @staticmethod
    def context_of(device: int) -> int:
        """The primary context of a device."""
        return 77 + device

    def queue(self, stream: int, work: Callable[[], None]) -> None:
        """Carry out now, or record."""
        assert stream == 0 or stream in self.streams
        if stream in self._recording:
            self._recording[stream].append(work)
        else:
            work()

    def is_recording(self, stream: int) -> bool:
        return stream in self._recording

    def check(self, address: int, nbytes: int) -> None:
        """Raise unless the bytes lie in one live allocation, or in mapped pages."""
        if not any(start <= address and address + nbytes <= start + size for start, size in self.allocated.items()):
            while nbytes > 0:
                page = next((one for one in self.mapped if one <= address < one + self.mapped[one][0]), None)
                assert page is not None, "illegal address"
                step = page + self.mapped[page][0] - address
                address, nbytes = address + step, nbytes - step

    def _owner(self, address: int) -> int | None:
        return next(self.owners[start] for start, size in self.allocated.items() if start <= address < start + size)

    def _id(self) -> int:
        self._next += 1
        return self._next

    # ---- device ----

    def _cuInit(self, flags: int) -> int:
        return 0 if self.devices else _NO_DEVICE

    def _cuDriverGetVersion(self, version: Any) -> None:
        version.value = self.cuda

    def _cuGetErrorString(self, code: int, text: Any) -> None:
        text.value = {2: b"out of memory", 100: b"no CUDA-capable device is detected"}.get(code, b"some error")

    def _cuDeviceGetCount(self, count: Any) -> None:
        count.value = self.devices

    def _cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device.value = ordinal

    def _cuDeviceGetName(self, name: Any, size: int, device: int) -> None:
        name.value = b"Fake GPU"

    def _cuDeviceTotalMem(self, total: Any, device: int) -> None:
        total.value = self.memory

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> None:
        value.value = 1 if attribute == cuda_driver.VIRTUAL_MEMORY else self.sm[attribute - 75]

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        context.value = self.context_of(device)

    def _cuCtxGetCurrent(self, context: Any) -> None:
        context.value = self.context

    def _cuCtxSetCurrent(self, context: int) -> None:
        self.context = context

    # ---- memory ----

    def _cuMemGetInfo(self, free: Any, total: Any) -> None:
        free.value, total.value = self.memory - self.used, self.memory

    @property
    def used(self) -> int:
        """Bytes of device memory in use."""
        return sum(self.allocated.values()) + sum(size for size, _ in self.handles.values())

    @property
    def mapped_bytes(self) -> int:
        """Those of them that are pages behind reserved addresses."""
        return sum(size for size, _ in self.mapped.values())

    def _cuMemAlloc(self, address: Any, nbytes: int) -> int:
        if self.used + nbytes > self.memory:
            return _OUT_OF_MEMORY
        address.value = self._memory(nbytes)
        ctypes.memset(address.value, 0xCD, nbytes)  # nobody may count on zeros
        self.allocated[address.value] = nbytes
        self.owners[address.value] = self.context
        self.peak = max(self.peak, self.used)
        return 0

    def _cuMemFree(self, address: int) -> None:
        del self.allocated[address], self._keep[address], self.owners[address]

    def _cuMemGetAllocationGranularity(self, size: Any, properties: Any, option: int) -> None:
        size.value = PAGE

    def _cuMemAddressReserve(self, address: Any, nbytes: int, alignment: int, wanted: int, flags: int) -> int:
        if nbytes % PAGE or not nbytes:
            return _INVALID_VALUE
        address.value = self._memory(nbytes)
        ctypes.memset(address.value, _POISON, nbytes)
        self.reserved[address.value] = nbytes
        return 0

    def _cuMemAddressFree(self, address: int, nbytes: int) -> None:
        assert self.reserved.pop(address) == nbytes
        assert not any(address <= one < address + nbytes for one in self.mapped), "pages are still mapped"
        del self._keep[address]

    def _cuMemCreate(self, handle: Any, nbytes: int, properties: Any, flags: int) -> int:
        assert nbytes % PAGE == 0
        if self.used + nbytes > self.memory:
            return _OUT_OF_MEMORY
        handle.value = self._id()
        self.handles[handle.value] = (nbytes, 1)
        self.owners[handle.value] = self.context_of(properties.location.id)
        self.peak = max(self.peak, self.used)
        return 0

    def _cuMemRelease(self, handle: int) -> None:
        size, users = self.handles[handle]
        self.handles[handle] = (size, users - 1)
        if users == 1:
            del self.handles[handle], self.owners[handle]

    def _cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> int:
        inside = any(start <= address and address + nbytes <= start + size for start, size in self.reserved.items())
        if not inside or offset or any(one < address + nbytes and address < one + size for one, (size, _) in self.mapped.items()):
            return _INVALID_VALUE
        size, users = self.handles[handle]
        assert size == nbytes
        self.handles[handle] = (size, users + 1)
        self.mapped[address] = (nbytes, handle)
        return 0

    def _cuMemSetAccess(self, address: int, nbytes: int, access: Any, count: int) -> None:
        assert self.mapped[address][0] == nbytes

    def _cuMemUnmap(self, address: int, nbytes: int) -> None:
        size, handle = self.mapped.pop(address)
        assert size == nbytes
        ctypes.memset(address, _POISON, nbytes)
        self._cuMemRelease(handle)

    def _memory(self, nbytes: int) -> int:
        raw = ctypes.create_string_buffer(nbytes + _ALIGNMENT)
        address = -(-ctypes.addressof(raw) // _ALIGNMENT) * _ALIGNMENT
        self._keep[address] = raw
        return address

    def _cuMemsetD8Async(self, address: int, value: int, nbytes: int, stream: int) -> None:
        self.check(address, nbytes)
        self.queue(stream, lambda: ctypes.memset(address, value, nbytes) and None)

    def _cuMemcpyHtoDAsync(self, device: int, host: int, nbytes: int, stream: int) -> None:
        self._copy(device, host, nbytes, stream, (device,))

    def _cuMemcpyDtoHAsync(self, host: int, device: int, nbytes: int, stream: int) -> None:
        self._copy(host, device, nbytes, stream, (device,))

    def _cuMemcpyDtoDAsync(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._copy(target, source, nbytes, stream, (target, source))

    def _copy(self, target: int, source: int, nbytes: int, stream: int, device: tuple[int, ...]) -> None:
        def work() -> None:
            for address in device:
                self.check(address, nbytes)
            ctypes.memmove(target, source, nbytes)

        self.queue(stream, work)

    def _cuDeviceCanAccessPeer(self, direct: Any, device: int, other: int) -> None:
        direct.value = int(device != other)

    def _cuCtxEnablePeerAccess(self, context: int, flags: int) -> int:
        assert context != self.context and not flags
        if (self.context, context) in self.connected:
            return 704
        self.connected.add((self.context, context))
        return 0

    def _cuMemcpyPeerAsync(self, target: int, target_context: int, source: int, source_context: int, nbytes: int, stream: int) -> None:
        assert (self._owner(target), self._owner(source)) == (target_context, source_context)
        self._copy(target, source, nbytes, stream, (target, source))

    def _cuMemcpy2DUnaligned(self, copy: Any) -> None:
        for row in range(copy.Height):
            target, source = copy.dstDevice + row * copy.dstPitch, copy.srcDevice + row * copy.srcPitch
            for address in (target, source):
                self.check(address, copy.WidthInBytes)
                inside = [one for one, (size, _) in self.mapped.items() if one < address + copy.WidthInBytes and address < one + size]
                assert len(inside) < 2, "a copy in two dimensions over several allocations"
            ctypes.memmove(target, source, copy.WidthInBytes)

    def _cuMemHostAlloc(self, address: Any, nbytes: int, flags: int) -> None:
        address.value = self._memory(nbytes)
        self.pinned[address.value] = nbytes

    def _cuMemFreeHost(self, address: int) -> None:
        del self.pinned[address], self._keep[address]

    def _cuMemHostRegister(self, address: int, nbytes: int, flags: int) -> None:
        self.pinned[address] = nbytes

    def _cuMemHostUnregister(self, address: int) -> None:
        del self.pinned[address]

    # ---- streams ----

    def _cuStreamCreate(self, stream: Any, flags: int) -> None:
        stream.value = self._id()
        self.streams.add(stream.value)

    def _cuStreamDestroy(self, stream: int) -> None:
        self.streams.remove(stream)

    def _cuStreamSynchronize(self, stream: int) -> int:
        self.waits += 1
        return _INVALID_VALUE if stream in self._recording else self.fault

    def _cuEventCreate(self, event: Any, flags: int) -> None:
        event.value = self._id()
        self.events.add(event.value)

    def _cuEventDestroy(self, event: int) -> None:
        self.events.remove(event)

    def _cuEventRecord(self, event: int, stream: int) -> int:
        assert event in self.events and stream in self.streams
        return _INVALID_VALUE if stream in self._recording else 0

    def _cuEventSynchronize(self, event: int) -> int:
        assert event in self.events
        self.waits += 1
        return self.fault

    def _cuStreamBeginCapture(self, stream: int, mode: int) -> None:
        self._recording[stream] = []

    def _cuStreamEndCapture(self, stream: int, graph: Any) -> None:
        graph.value = self._id()
        self.recordings[graph.value] = self._recording.pop(stream)

    def _cuGraphInstantiateWithFlags(self, executable: Any, graph: int, flags: int) -> None:
        executable.value = self._id()
        self.recordings[executable.value] = self.recordings[graph]

    def _cuGraphDestroy(self, graph: int) -> None:
        del self.recordings[graph]

    def _cuGraphExecDestroy(self, executable: int) -> None:
        del self.recordings[executable]

    def _cuGraphLaunch(self, executable: int, stream: int) -> None:
        self.launches += 1
        for work in self.recordings[executable]:
            self.queue(stream, work)

    # ---- kernels ----

    def _cuModuleLoadData(self, module: Any, image: bytes) -> None:
        module.value = self._id()
        self.modules[module.value] = image

    def _cuModuleGetFunction(self, function: Any, module: int, name: bytes) -> None:
        function.value = self._id()
        self.functions[function.value] = (module, name)

    def _cuLaunchKernel(self, function: int, *arguments: Any) -> None:
        *grid_and_block, shared, stream, parameters, extra = arguments
        assert not shared and extra is None
        _, name = self.functions[function]
        self.queue(stream, lambda: self.kernels.append((name, tuple(grid_and_block), parameters)))
