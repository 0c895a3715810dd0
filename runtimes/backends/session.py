"""What a decoder needs of a backend: sessions, and calls with everything bound."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from qwen_export.manifest import GraphSpec
from qwen_export.runtimes.memory.buffers import Buffer
from qwen_export.runtimes.memory.device import Device
from qwen_export.runtimes.memory.host_buffer import HostBuffer


class Call(Protocol):
    """Bindings that run many times: addresses stay, contents change."""

    def bind_input(self, name: str, buffer: Buffer) -> None:
        """The graph reads an input from the whole of a buffer."""

    def bind_output(self, name: str, buffer: Buffer) -> None:
        """The graph writes an output to the whole of a buffer."""

    def prepare(self) -> None:
        """Do now what the first runs do besides running, such as compiling and recording. The call may run once for that: the controls
        must commit nothing, and place new cache rows after those that were read."""

    def send(self, target: Buffer, source: HostBuffer) -> None:
        """Every run begins by copying locked memory of the host to the device. For calls that are recorded."""

    def fetch(self, target: HostBuffer, source: Buffer) -> None:
        """Every run ends by copying results to locked memory of the host, likewise. They are there when the run has been waited for."""

    def queue(self) -> None:
        """Begin to run; what is queued on the device afterwards comes behind it. `run`, where a call cannot be waited for later."""

    def start(self) -> None:
        """Begin to run, maybe in other threads. Where calls do not overlap this is `run`. Raises as `run` does, now or in `finish`."""

    def finish(self) -> None:
        """Wait for the end of what was started or queued."""

    def run(self) -> None:
        """Run and wait. Raises BundleError when the backend fails; what the call writes is undefined then."""

    def stop(self) -> None:
        """End a run early, from another thread: it raises then. Nothing where the backend cannot, or the call is `repeated`."""


class Session(Protocol):
    """One compiled graph, loaded on one device."""

    @property
    def spec(self) -> GraphSpec: ...

    @property
    def device(self) -> Device: ...

    @property
    def devices(self) -> tuple[Device, ...]:
        """Each device that a part of the graph is on, once."""

    def device_of(self, name: str) -> Device:
        """Where a state or an output of the graph is."""

    def stage_of(self, name: str) -> int:
        """Which of several consecutive graphs has a state or an output."""

    @property
    def overlaps(self) -> bool:
        """Whether calls may be started before others have finished."""

    def shared(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Zeroed memory that is written from the host, and that inputs of the whole graph can be bound to."""

    @property
    def busy_s(self) -> float:
        """Seconds spent in calls so far, without those of `binding_s`."""

    @property
    def binding_s(self) -> float:
        """Seconds spent so far on what happens once: opening, compiling, recording."""

    @property
    def records(self) -> bool:
        """Whether repeated calls are recorded by their first run, which then runs the graph several times."""

    @property
    def queues(self) -> bool:
        """Whether `queue` of a recorded call returns while the device works."""

    def buffer(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Zeroed memory that calls of this session can be bound to."""

    def call(self, *, repeated: bool) -> Call:
        """Bindings for one shape. A `repeated` call is worth recording, where the device can."""

    def uncounted(self) -> AbstractContextManager[None]:
        """Calls in here are not part of `busy_s`."""

    def close(self) -> None:
        """Release the graph and its memory. No call may follow."""
