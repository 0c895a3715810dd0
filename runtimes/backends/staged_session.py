"""One graph in stages: consecutive graphs, each with its weights and states on a device of its own, that run one after the other.

A decoder sees one session. What a stage hands on is copied from device to device; what all stages read is kept on each (`MirroredBuffer`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from qwen_export.bundle_contract import INPUT_IDS
from qwen_export.manifest import GraphSpec
from qwen_export.runtimes.backends.session import Call, Session
from qwen_export.runtimes.memory.buffers import Buffer
from qwen_export.runtimes.memory.device import Device
from qwen_export.runtimes.memory.host_buffer import HostBuffer
from qwen_export.runtimes.memory.mirrored_buffer import MirroredBuffer
from qwen_export.stages import joined, links


class StagedSession:
    """`stages` in order; several may be on one device."""

    def __init__(self, stages: Sequence[Session]) -> None:
        self.stages = tuple(stages)
        self.spec: GraphSpec = joined([stage.spec for stage in stages])
        self.links = links([stage.spec for stage in stages])
        """Values that a stage hands on: name and number of the stage that computes each."""
        self._stage_of = {
            name: number
            for number, stage in enumerate(stages)
            for name in (*(tensor.name for tensor in stage.spec.outputs), *(state.name for state in stage.spec.states))
        }
        self.overlaps = len(self.devices) > 1
        """Stages on one device have nothing to gain from running side by side."""
        self.busy_s = 0.0
        self._threads: list[ThreadPoolExecutor] = []

    @property
    def device(self) -> Device:
        """That of the last stage, which has the logits."""
        return self.stages[-1].device

    @property
    def devices(self) -> tuple[Device, ...]:
        """Each device once."""
        return tuple(dict.fromkeys(stage.device for stage in self.stages))

    def device_of(self, name: str) -> Device:
        """Where a state or an output is."""
        return self.stages[self._stage_of[name]].device

    def stage_of(self, name: str) -> int:
        return self._stage_of[name]

    def thread(self, number: int) -> ThreadPoolExecutor:
        """The one thread that runs a stage for calls that overlap, in the order of their starts."""
        while len(self._threads) <= number:
            self._threads.append(ThreadPoolExecutor(1, f"stage {len(self._threads)}"))
        return self._threads[number]

    def shared(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        return mirrored(self.devices, dtype, shape)

    @property
    def binding_s(self) -> float:
        return sum(stage.binding_s for stage in self.stages)

    @property
    def records(self) -> bool:
        return all(stage.records for stage in self.stages)

    @property
    def queues(self) -> bool:
        """A stage waits for the one before."""
        return False

    def buffer(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        return self.device.buffer(dtype, shape)

    def call(self, *, repeated: bool) -> StagedCall:
        return StagedCall(self, [stage.call(repeated=repeated) for stage in self.stages])

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        busy = self.busy_s
        with ExitStack() as stack:
            for stage in self.stages:
                stack.enter_context(stage.uncounted())
            try:
                yield
            finally:
                self.busy_s = busy

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()
        for stage in self.stages:
            stage.close()


def mirrored(devices: Sequence[Device], dtype: str, shape: tuple[int, ...]) -> Buffer:
    """Memory that is written on the host and read on all of these devices."""
    copies = {device: device.buffer(dtype, shape) for device in devices}
    return copies[devices[0]] if len(copies) == 1 else MirroredBuffer(copies)


class _Handover(NamedTuple):
    """A value that `stage` reads in memory of its own, and where its maker leaves it."""

    stage: int
    target: Buffer
    source: Buffer


class StagedCall:
    """Bindings of one call of each stage."""

    def __init__(self, session: StagedSession, calls: Sequence[Call]) -> None:
        self._session, self._calls = session, calls
        self._inputs = [{tensor.name for tensor in stage.spec.inputs} for stage in session.stages]
        self._outputs = [{tensor.name for tensor in stage.spec.outputs} for stage in session.stages]
        self._handovers: list[_Handover] = []
        self._running: list[Future[None]] = []
        self._kept: list[Buffer] = []  # bindings hold addresses only

    def bind_input(self, name: str, buffer: Buffer) -> None:
        """See Call. Token ids [B,T] also tell the size of what the stages hand on."""
        for stage, call, names in zip(self._session.stages, self._calls, self._inputs, strict=True):
            if name in names:
                call.bind_input(name, buffer.on(stage.device.kind, stage.device.index))
        if name == INPUT_IDS:
            self._bind_links(*buffer.shape)

    def bind_output(self, name: str, buffer: Buffer) -> None:
        number = next(number for number, names in enumerate(self._outputs) if name in names)
        self._calls[number].bind_output(name, buffer)

    def send(self, target: Buffer, source: HostBuffer) -> None:
        """The first stage on each device does it for those behind."""
        devices = [stage.device for stage in self._session.stages]
        for number, device in enumerate(devices):
            if device not in devices[:number]:
                self._calls[number].send(target.on(device.kind, device.index), source)

    def fetch(self, target: HostBuffer, source: Buffer) -> None:
        """Of the last stage, which has the logits."""
        self._calls[-1].fetch(target, source)

    def _bind_links(self, B: int, T: int) -> None:
        stages = self._session.stages
        for name, maker in self._session.links.items():
            spec = next(tensor for tensor in stages[maker].spec.outputs if tensor.name == name)
            shape = tuple(dim if isinstance(dim, int) else {"B": B, "T": T}[dim] for dim in spec.shape)
            copies = {stages[maker].device: stages[maker].buffer(spec.dtype, shape)}
            source = copies[stages[maker].device]
            self._calls[maker].bind_output(name, source)
            self._kept.append(source)
            for number, (stage, names) in enumerate(zip(stages, self._inputs, strict=True)):
                if name not in names:
                    continue
                if stage.device not in copies:
                    copies[stage.device] = stage.buffer(spec.dtype, shape)
                    self._handovers.append(_Handover(number, copies[stage.device], source))
                self._calls[number].bind_input(name, copies[stage.device])

    def prepare(self) -> None:
        for call in self._calls:
            call.prepare()

    def run(self) -> None:
        started = time.perf_counter()
        try:
            for number in range(len(self._calls)):
                self._run_stage(number)
        finally:
            self._session.busy_s += time.perf_counter() - started

    def queue(self) -> None:
        self.run()

    def stop(self) -> None:
        for call in self._calls:
            call.stop()

    def start(self) -> None:
        """Begin with the first stage as soon as it is free. Of two calls that were started, each stage runs the earlier one first."""
        for number in range(len(self._calls)):
            before = self._running[-1] if self._running else None
            self._running.append(self._session.thread(number).submit(self._run_behind, number, before))

    def finish(self) -> None:
        """See Call. Also when a stage fails, no stage of the call runs any more when this returns."""
        started = time.perf_counter()
        running, self._running = self._running, []
        wait(running)
        self._session.busy_s += time.perf_counter() - started
        for stage in running:
            stage.result()

    def _run_behind(self, number: int, before: Future[None] | None) -> None:
        if before is not None:
            before.result()
        self._run_stage(number)

    def _run_stage(self, number: int) -> None:
        for handover in self._handovers:
            if handover.stage == number:
                handover.target.copy_from(handover.source, 0, 0, handover.source.nbytes)
        self._calls[number].run()
