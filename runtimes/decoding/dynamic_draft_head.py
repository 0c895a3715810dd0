"""The draft head over one graph with dynamic shapes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.decoding.bound_call import BoundCall, LogitsMemory
from qwen_export.runtimes.decoding.cache_room import CacheRoom
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.draft_head import WAITING, DraftHead
from qwen_export.runtimes.decoding.logit_rows import Row, Rows
from qwen_export.runtimes.decoding.rotary_tables import RotaryTables
from qwen_export.runtimes.memory.buffers import Buffer

# Rows are caught up with in calls of these sizes: on CUDA the first call of any other size costs some 50 ms, these are recorded once.
CATCH_UP_BLOCKS: dict[str, tuple[int, ...]] = {"cuda": (512, 64, 8, 1)}

_Shape = tuple[int, int, int, int, bool]
"""First slot, sequences, tokens of each, rows of logits of each, own rotary tables."""


class DynamicDraftHead(DraftHead):
    """`tables` and `room` are the decoder's."""

    def __init__(self, session: Session, decoder: Decoder, tables: RotaryTables, room: CacheRoom) -> None:
        self.session, self._tables, self._room = session, tables, room
        spec = next(tensor for tensor in session.spec.inputs if tensor.name == "hidden")
        width, rows, slots = int(spec.shape[-1]), decoder.chunk + WAITING, decoder.batch
        super().__init__(decoder, session.buffer(spec.dtype, (slots, rows, width)))
        # States that a call reads and leaves: of one sequence's rows, and of drafts that follow drafts, one per slot.
        self._input, self._output = session.buffer(spec.dtype, (rows, width)), session.buffer(spec.dtype, (rows, width))
        self._drafts, self._drafts_out = session.buffer(spec.dtype, (slots, width)), session.buffer(spec.dtype, (slots, width))
        self.caches: dict[str, Buffer] = {spec.name: room.make(spec) for spec in session.spec.states}
        self._logits = LogitsMemory(session, slots, 1)
        self._calls: dict[_Shape, BoundCall] = {}
        self._blocks = CATCH_UP_BLOCKS.get(session.device.kind, ())

    @property
    def busy_s(self) -> float:
        return self.session.busy_s

    def prepare_round(self) -> None:
        """Make what the next drafts need: rows that plain steps have left are read, and calls bound."""
        for slot in range(self._reader.batch):
            if self.behind(slot) > self._reader.widest_verify:
                self.catch_up(slot)
        self.prepare()

    def prepare(self, longest: int = 1) -> None:
        """Make what drafts after up to `longest` tokens need. Between drafts; what the calls leave is not read."""
        for T in range(1, longest + 1):
            shape = (0, 1, T, 1, self._tables.own(0))
            if shape not in self._calls:
                self._bind(shape)

    def grow(self) -> None:
        """The decoder's caches have more rows."""
        self.caches = self._room.grown(self.caches, max(self.lengths))
        self._calls.clear()

    def following(self, tokens: Mapping[int, int], depth: int) -> dict[int, Row]:
        """See DraftHead; neighboring slots share a call."""
        made: dict[int, Row] = {}
        slots = sorted(tokens)
        while slots:
            b = next((n for n in range(1, len(slots)) if slots[n] != slots[0] + n or self._alone(slots[n])), len(slots))
            b = 1 if self._alone(slots[0]) else b
            group, slots = slots[:b], slots[b:]
            shape = (group[0], b, 1, 1, self._tables.own(group[0]))
            call = self._calls.get(shape) or self._bind(shape)
            rows = call.run([tokens[slot] for slot in group], [self.lengths[slot] + depth - 1 for slot in group])
            self._keep(group[0], b, self._drafts_out, group[0] * self._row_bytes)
            made |= {slot: rows[place] for place, slot in enumerate(group)}
        return made

    def _alone(self, slot: int) -> bool:
        return self._tables.own(slot)

    def _keep(self, slot: int, count: int, source: Buffer, at: int) -> None:
        """The states of `count` slots from byte `at` of `source` on are what their next drafts read."""
        self._drafts.copy_from(source, slot * self._row_bytes, at, count * self._row_bytes)

    def _read_rows(self, slot: int, tokens: Sequence[int], at: int, rows: int) -> Row:
        row, made, start = self._row_bytes, Rows.none()[0], 0
        for size in self._parts(len(tokens), rows):
            shape = (slot, 1, size, rows, self._tables.own(slot))
            one = size == 1 and rows > 0
            target, place = (self._drafts, slot * row) if one else (self._input, 0)
            target.copy_from(self._log, place, at + start * row, size * row)
            call = self._calls.get(shape) or self._bind(shape)
            made = call.run(tokens[start : start + size], [self.lengths[slot] + start])[0]
            if rows:
                self._keep(slot, 1, *((self._drafts_out, slot * row) if one else (self._output, (size - 1) * row)))
            start += size
        return made

    def _parts(self, count: int, rows: int) -> Iterator[int]:
        """Sizes of the calls that read so many rows."""
        for size in self._blocks if not rows else ():
            while count >= size:
                yield size
                count -= size
        if count:
            yield count

    def _bind(self, shape: _Shape) -> BoundCall:
        """Calls that draft come again: after one token, or after what a round accepted. So do blocks; other calls have odd sizes."""
        first, b, T, rows, _ = shape
        started = time.perf_counter()
        with self.session.uncounted():  # counted once, as time spent on bindings
            caches = {name: buffer.rows(first, b) for name, buffer in self.caches.items()}
            width = self._input.shape[-1]
            one = T == 1 and rows > 0
            hidden, out = (buffer.rows(first, b) for buffer in (self._drafts, self._drafts_out)) if one else (self._input, self._output)
            inputs = caches | self._tables.of(first) | {"hidden": hidden.part(hidden.dtype, (b, T, width))}
            outputs = {state.after: caches[state.name] for state in self.session.spec.states}
            outputs["hidden_out"] = out.part(out.dtype, (b, T, width))
            dims = {"B": b, "T": T, "N": b * rows, "S": self._room.rows}
            comes_back = rows > 0 or T in self._blocks
            call = BoundCall(self.session, dims, first, inputs, outputs, self._logits, repeated=comes_back)
            if call.recorded:
                # Recording runs the graph; what it writes, the real run behind it writes again.
                call.run([0] * (b * T), self.lengths[first : first + b])
        if comes_back:
            self._calls[shape] = call
        self.binding_s += time.perf_counter() - started
        return call
