"""What sessions and calls of one graph have in common: everything is on one device, and a call that was started has ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from qwen_export.runtimes.memory.buffers import Buffer
from qwen_export.runtimes.memory.device import Device


class WholeSession(ABC):
    """See Session. A graph in several is a `StagedSession`."""

    overlaps = False
    device: Device
    busy_s: float

    @abstractmethod
    def buffer(self, dtype: str, shape: tuple[int, ...]) -> Buffer: ...

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


class WholeCall(ABC):
    """See Call."""

    @abstractmethod
    def run(self) -> None: ...

    def start(self) -> None:
        self.run()

    def finish(self) -> None:  # noqa: B027 - nothing is left to do
        """Nothing: `start` has waited."""

    def stop(self) -> None:  # noqa: B027 - most backends run a call to its end
        """Nothing."""
