"""A queue of work on one device, and work that is recorded once and started as one (a CUDA graph).

Graphs that ONNX Runtime runs, copies and recordings of one device are queued on one stream, `device_stream`. So they run in the order in
which they were queued, whatever threads queue them, and nobody waits for what only other work on the device needs.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qwen_export.runtimes.memory import cuda_driver
from qwen_export.runtimes.memory.cuda_driver import call

_NON_BLOCKING = 1  # independent of stream 0
_NO_TIMING = 2
# While a stream records, calls of the recording thread that are no work on a stream, such as an allocation, either spoil the recording or
# are done at once. What other threads do meanwhile is never part of it.
_STRICT, _RELAXED = 1, 2
_DEAD = "After a failed call the GPU can only be used by a new process."


class Stream:
    """Work on it runs in order. `handle` is the driver's, for libraries that queue work of their own. A thread that queues work holds
    `turn` where another one may record on the stream: a recording takes in whatever is queued."""

    def __init__(self, device_id: int = 0) -> None:
        cuda_driver.use_device(device_id)
        self.device_id = device_id
        self.turn = threading.RLock()
        stream = ctypes.c_void_p()
        call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        self.handle = int(stream.value or 0)
        self.waits = 0
        """How often the program has waited for all that was queued."""

    def synchronize(self) -> None:
        """Wait for everything queued so far."""
        call("cuStreamSynchronize", self.handle, fix=_DEAD)
        self.waits += 1

    def record(self, queue: Callable[[], None], *, may_allocate: bool = False) -> Recording:
        """What `queue` queues on this stream, recorded and not carried out. `may_allocate`: memory that it allocates meanwhile lives as
        long as the recording, so that it may; else that ends the recording with an error."""
        graph = ctypes.c_void_p()
        with _no_collection():
            call("cuStreamBeginCapture_v2", self.handle, _RELAXED if may_allocate else _STRICT)
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


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected: what is freed then may wait for the stream, which a recording does not survive."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


_streams: dict[int, Stream] = {}
_making = threading.Lock()
cuda_driver.at_forgetting.append(_streams.clear)


def device_stream(device_id: int) -> Stream:
    """The one that all work on a device takes its turn on. Lives as long as the process."""
    with _making:  # graphs are opened side by side, and two streams of a device would be in no order
        if device_id not in _streams:
            _streams[device_id] = Stream(device_id)
        return _streams[device_id]


class Recording:
    """Work that can be queued again and again, with the addresses it was recorded with."""

    def __init__(self, stream: Stream, graph: int) -> None:
        executable = ctypes.c_void_p()
        call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        self._executable, self._stream = executable, stream
        self._queue, self._at = cuda_driver.driver().cuGraphLaunch, ctypes.c_void_p(stream.handle)

    def launch(self) -> None:
        code = self._queue(self._executable, self._at)  # the GPU is idle: no look-up stands before it
        if code:
            raise cuda_driver.failure("cuGraphLaunch", code, _DEAD)

    def __del__(self) -> None:
        if hasattr(self, "_executable") and not sys.is_finalizing():
            cuda_driver.driver().cuGraphExecDestroy(self._executable)


class Event:
    """A place in a stream's work, which a thread can wait for while others queue more."""

    def __init__(self, stream: Stream) -> None:
        cuda_driver.use_device(stream.device_id)
        event = ctypes.c_void_p()
        call("cuEventCreate", ctypes.byref(event), _NO_TIMING)
        driver = cuda_driver.driver()
        self._event, self._at = event, ctypes.c_void_p(stream.handle)
        self._record, self._wait = driver.cuEventRecord, driver.cuEventSynchronize

    def record(self) -> None:
        """Behind all that is queued now."""
        code = self._record(self._event, self._at)
        if code:
            raise cuda_driver.failure("cuEventRecord", code, _DEAD)

    def wait(self) -> None:
        """Until the work in front of it is done. Raises BundleError where that has failed."""
        code = self._wait(self._event)
        if code:
            raise cuda_driver.failure("cuEventSynchronize", code, _DEAD)

    def __del__(self) -> None:
        if hasattr(self, "_event") and not sys.is_finalizing():
            cuda_driver.driver().cuEventDestroy_v2(self._event)
