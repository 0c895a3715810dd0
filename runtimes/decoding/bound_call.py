"""A graph call of one shape with everything bound: only the controls (token ids, lengths, ...) change from run to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from qwen_export.manifest import TensorSpec
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_session import HOST_INPUTS
from qwen_export.runtimes.backends.session import Call, Session
from qwen_export.runtimes.decoding.controls import Controls
from qwen_export.runtimes.decoding.logit_rows import TOP_IDS, TOP_LOGITS, LogitsBuffers, Rows
from qwen_export.runtimes.memory.buffers import Buffer
from qwen_export.runtimes.memory.host_buffer import HostBuffer
from qwen_export.runtimes.memory.pinned_memory import PinnedBuffer


class LogitsMemory:
    """Memory for the logits of a graph's calls. They are valid until the next run, in which a slot takes part once: each slot has a place
    for `rows` rows, as many as a step or a verify needs. A call with more, for measuring, gets memory of its own."""

    def __init__(self, session: Session, slots: int, rows: int) -> None:
        self._device, self._slots, self._rows = session.device_of("logits"), slots, rows
        self._specs = {spec.name: spec for spec in session.spec.outputs if spec.name in ("logits", TOP_LOGITS, TOP_IDS)}
        self._all: Buffer | None = None

    def take(self, dims: Mapping[str, int], slot: int, call: Call | None) -> tuple[dict[str, Buffer], LogitsBuffers]:
        """Buffers of a call with these dims whose first sequence is in `slot`, by output. `call`: it brings the largest logits to the host
        itself, None: they are copied when they are read."""
        shapes = {name: sizes(spec, dims) for name, spec in self._specs.items()}
        made = {"logits": self._logits(self._specs["logits"].dtype, shapes["logits"], slot)}
        largest: Buffer | None = None
        fetched: PinnedBuffer | None = None
        if TOP_IDS in shapes:
            largest = self._device.buffer("int32", (2, *shapes[TOP_IDS]))
            if call is not None and largest.nbytes:
                fetched = PinnedBuffer("int32", largest.shape)
                call.fetch(fetched, largest)
            made[TOP_LOGITS] = largest.part(self._specs[TOP_LOGITS].dtype, shapes[TOP_LOGITS])
            made[TOP_IDS] = largest.part("int32", shapes[TOP_IDS], largest.nbytes // 2)
        return made, LogitsBuffers(made["logits"], made.get(TOP_LOGITS), made.get(TOP_IDS), largest, fetched)

    def _logits(self, dtype: str, shape: tuple[int, ...], slot: int) -> Buffer:
        place = slot * self._rows
        if place + prod(shape[:-1]) > self._slots * self._rows:
            return self._device.buffer(dtype, shape)
        if self._all is None:
            self._all = self._device.buffer(dtype, (self._slots * self._rows, shape[-1]))
        return self._all.part(dtype, shape, place * self._all.row_bytes)


def wanted_rows(T: int, counts: Sequence[int], logits: Sequence[int], most: int) -> list[int]:
    """Which of the B*T rows of a call get logits: the last `logits` of the first `counts` of each sequence, the last of them again where
    that are fewer than `most`."""
    rows: list[int] = []
    for place, (count, wanted) in enumerate(zip(counts, logits, strict=True)):
        start, end = place * T + count - wanted, place * T + count
        rows += [*range(start, end), *[end - 1] * (most - wanted)]
    return rows


def sizes(spec: TensorSpec, dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else dims[d] for d in spec.shape)


class BoundCall:
    """`dims` are the sizes of the call, `slot` is that of its first sequence. `inputs` and `outputs` are buffers by name; the other inputs
    are the controls and get memory here. Of the other outputs the logits and the largest of them get theirs from `logits`; the rest, which
    only an observer reads, get it here. A `repeated` call is worth recording, where the device can."""

    def __init__(
        self,
        session: Session,
        dims: Mapping[str, int],
        slot: int,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        logits: LogitsMemory,
        *,
        repeated: bool,
    ) -> None:
        self._call = session.call(repeated=repeated)
        B, self._T, self._cache_rows = dims["B"], dims["T"], dims["S"]
        self.recorded = repeated and session.records
        changing = {spec.name: (spec.dtype, sizes(spec, dims)) for spec in session.spec.inputs if spec.name not in inputs}
        self._copies = self.recorded and not session.device.is_host
        make = None if session.device.is_host else session.shared
        self._controls = Controls(make, changing, HOST_INPUTS, PinnedBuffer if self._copies else HostBuffer)
        if self._copies and self._controls.read is not None:
            self._call.send(self._controls.read, self._controls.written)
        for spec in session.spec.inputs:
            self._call.bind_input(spec.name, inputs[spec.name] if spec.name in inputs else self._controls.buffers[spec.name])
        self.results, self._logits = logits.take(dims, slot, self._call if self._copies else None)
        """Those outputs by name, as buffers."""
        for spec in session.spec.outputs:
            if spec.name not in outputs and spec.name not in self.results:
                self.results[spec.name] = session.device_of(spec.name).buffer(spec.dtype, sizes(spec, dims))
            self._call.bind_output(spec.name, outputs[spec.name] if spec.name in outputs else self.results[spec.name])
        self._last_rows = wanted_rows(self._T, [self._T] * B, [dims["N"] // B] * B, dims["N"] // B)
        self._rows: Sequence[int] = []

    def run(self, ids: Sequence[int], lengths: Sequence[int], rows: Sequence[int] | None = None, **controls: Sequence[int]) -> Rows:
        """`ids` [b,T] new tokens, sequence after sequence, `lengths` [b] tokens read before; `rows` [N] are those of the b*T rows that get
        logits, None the last of each sequence. `controls` are written where the graph has them. Returns the logits, valid until the next
        run."""
        self._write(ids, lengths, rows, controls)
        self._call.run()
        return self._logits.rows()

    def queue(self, ids: Sequence[int], lengths: Sequence[int], rows: Sequence[int] | None = None, **controls: Sequence[int]) -> None:
        """Begin what `run` does: copies that follow see what the call leaves. `finish` waits, and returns the logits; it must follow before
        the call is used again."""
        self._write(ids, lengths, rows, controls)
        self._call.queue()

    def start(self, ids: Sequence[int], lengths: Sequence[int], **controls: Sequence[int]) -> None:
        """Begin what `run` does, with the last rows of each sequence, beside other calls: nothing may rely on what it leaves before
        `finish`."""
        self._write(ids, lengths, None, controls)
        self._call.start()

    def finish(self) -> Rows:
        self._call.finish()
        return self._logits.rows()

    def _write(self, ids: Sequence[int], lengths: Sequence[int], rows: Sequence[int] | None, controls: Mapping[str, Sequence[int]]) -> None:
        write = self._controls.set
        rows = self._last_rows if rows is None else rows
        if rows != self._rows:
            write("logit_rows", rows)
            self._rows = rows
        write("input_ids", ids)
        write("length", lengths)
        write("last_slot", [length + self._T - 1 for length in lengths])
        # A recorded step keeps the value it was recorded with: the number of cache rows is right for all of them.
        write("total_length", [self._cache_rows if self.recorded else max(lengths) + self._T])
        for name, value in controls.items():
            if value:
                write(name, value)
        if not self._copies:
            self._controls.send()
