"""A queue of work on one device, and work that is recorded once and started as one (a CUDA graph)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

from qwen_export.runtimes.memory import cuda_driver
from qwen_export.runtimes.memory.cuda_driver import call

_NON_BLOCKING = 1  # independent of stream 0
_THREAD_LOCAL = 1  # what other threads do meanwhile does not spoil a recording


class Stream:
    """Work on it runs in order. `handle` is the driver's, for libraries that queue work of their own."""

    def __init__(self, device_id: int = 0) -> None:
        cuda_driver.use_device(device_id)
        self.device_id = device_id
        stream = ctypes.c_void_p()
        call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        self.handle = int(stream.value or 0)
        self.waits = 0
        """How often the program has waited for all that was queued."""

    def synchronize(self) -> None:
        """Wait for everything queued so far."""
        call("cuStreamSynchronize", self.handle, fix="After a failed call the GPU can only be used by a new process.")
        self.waits += 1

    def record(self, queue: Callable[[], None]) -> Recording:
        """What `queue` queues on this stream, recorded and not carried out."""
        call("cuStreamBeginCapture_v2", self.handle, _THREAD_LOCAL)
        graph = ctypes.c_void_p()
        try:
            queue()
        except BaseException:  # a recording that failed must end too, or the stream stays unusable
            cuda_driver.driver().cuStreamEndCapture(self.handle, ctypes.byref(graph))
            raise
        call("cuStreamEndCapture", self.handle, ctypes.byref(graph))
        try:
            return Recording(self, int(graph.value or 0))
        finally:
            call("cuGraphDestroy", graph)

    def __del__(self) -> None:
        if getattr(self, "handle", 0) and not sys.is_finalizing():
            cuda_driver.driver().cuStreamDestroy_v2(self.handle)


class Recording:
    """Work that can be queued again and again, with the addresses it was recorded with."""

    def __init__(self, stream: Stream, graph: int) -> None:
        self._stream = stream
        executable = ctypes.c_void_p()
        call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        self._executable = int(executable.value or 0)

    def launch(self) -> None:
        call("cuGraphLaunch", self._executable, self._stream.handle)

    def __del__(self) -> None:
        if getattr(self, "_executable", 0) and not sys.is_finalizing():
            cuda_driver.driver().cuGraphExecDestroy(self._executable)
