"""What sessions and calls of one graph have in common: everything is on one device, and a call that was started has ended."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen_export.errors import QwenExportError
from qwen_export.runtimes.memory.buffers import Buffer
from qwen_export.runtimes.memory.device import Device
from qwen_export.runtimes.memory.host_buffer import HostBuffer


class WholeSession(ABC):
    """See Session. A graph in several is a `StagedSession`."""

    overlaps = False
    queues = False
    device: Device
    busy_s: float

    @abstractmethod
    def buffer(self, dtype: str, shape: tuple[int, ...]) -> Buffer: ...

    @property
    def devices(self) -> tuple[Device, ...]:
        return (self.device,)

    def device_of(self, name: str) -> Device:
        return self.device

    def stage_of(self, name: str) -> int:
        return 0

    def shared(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        return self.buffer(dtype, shape)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        busy = self.busy_s
        try:
            yield
        finally:
            self.busy_s = busy


class LateSession(WholeSession):
    """A graph that is opened at once, or with `later` before its first call, which most runs may never make."""

    def __init__(self, *, later: bool) -> None:
        """The last thing that a constructor does: it opens the graph."""
        self.busy_s = 0.0
        """Seconds spent in calls so far."""
        self.binding_s = 0.0
        """Seconds that calls cost once, besides: opening a graph `later`."""
        self._closed = False
        self._native: Any = None
        if not later:
            self._native = self._open()

    @abstractmethod
    def _open(self) -> Any:
        """The backend's own session."""

    @property
    def native(self) -> Any:
        """The backend's own session; opened now if it was not. Raises QwenExportError for a model that is closed."""
        self.require_open()
        if self._native is None:
            started = time.perf_counter()
            self._native = self._open()
            self.binding_s += time.perf_counter() - started
        return self._native

    def require_open(self) -> None:
        """Raise QwenExportError for a model that is closed."""
        if self._closed:
            raise QwenExportError("the model is closed", fix="Load the bundle again.")

    def close(self) -> None:
        self._closed, self._native = True, None


class WholeCall(ABC):
    """See Call."""

    @abstractmethod
    def run(self) -> None: ...

    def send(self, target: Buffer, source: HostBuffer) -> None:
        raise NotImplementedError(type(self).__name__)

    def fetch(self, target: HostBuffer, source: Buffer) -> None:
        raise NotImplementedError(type(self).__name__)

    def queue(self) -> None:
        self.run()

    def start(self) -> None:
        self.run()

    def finish(self) -> None:  # noqa: B027 - nothing is left to do
        """Nothing: `start` has waited."""

    def stop(self) -> None:  # noqa: B027 - most backends run a call to its end
        """Nothing."""
