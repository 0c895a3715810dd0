"""The draft head over one graph with dynamic shapes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from qwen_export.bundle_contract import FEATURES
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.decoding.bound_call import BoundCall, LogitsMemory, wanted_rows
from qwen_export.runtimes.decoding.cache_room import CacheRoom
from qwen_export.runtimes.decoding.call_plan import Sharing, plan_calls
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.draft_head import WAITING, DraftHead
from qwen_export.runtimes.decoding.features_memory import features_memory, rows_of
from qwen_export.runtimes.decoding.logit_rows import Row, Rows
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.decoding.rotary_tables import RotaryTables
from qwen_export.runtimes.memory.buffers import Buffer, as_bytes

# Rows are caught up with in calls of these sizes: on CUDA the first call of any other size costs some 50 ms, these are recorded once.
CATCH_UP_BLOCKS: dict[str, tuple[int, ...]] = {"cuda": (512, 64, 8, 1)}

_Shape = tuple[int, int, int, int, bool, int]
"""First slot, sequences, tokens of each, rows of logits of each, own rotary tables, tokens of pictures."""


class DynamicDraftHead(DraftHead):
    """`tables` and `room` are the decoder's; `padding` as in `Sharing`."""

    def __init__(self, session: Session, decoder: Decoder, tables: RotaryTables, room: CacheRoom, padding: int) -> None:
        self.session, self._tables, self._room = session, tables, room
        spec = next(tensor for tensor in session.spec.inputs if tensor.name == "hidden")
        width, rows, slots = int(spec.shape[-1]), decoder.chunk + WAITING, decoder.batch
        super().__init__(decoder, session.buffer(spec.dtype, (slots, rows, width)), session.buffer(spec.dtype, (slots, width)))
        # States that a call reads and leaves: of one sequence's rows, and of drafts that follow drafts, one per slot.
        self._input, self._output = session.buffer(spec.dtype, (rows, width)), session.buffer(spec.dtype, (rows, width))
        self._drafts, self._drafts_out = session.buffer(spec.dtype, (slots, width)), session.buffer(spec.dtype, (slots, width))
        self._pictures = features_memory(session, decoder.chunk + WAITING)
        self.caches: dict[str, Buffer] = {spec.name: room.make(spec, session.device) for spec in session.spec.states}
        self._logits = LogitsMemory(session, slots, 1)
        self._sharing = Sharing.of({tensor.name for tensor in session.spec.inputs}, padding, decoder.chunk, recurrent=False)
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

    def prepare(self, longest: int = 1, slots: int = 1) -> None:
        """Make what drafts after up to `longest` tokens need, of one slot and of the first 2, 4, 8, ... up to `slots`. Between drafts; what
        the calls leave is not read."""
        for count in (1 << power for power in range(slots.bit_length())):
            for T in range(1, longest + 1):
                shape = (0, count, T, 1, self._tables.own(0), 0)
                if shape not in self._calls:
                    self._bind(shape)

    def grow(self) -> None:
        """The decoder's caches have more rows."""
        self.caches = self._room.grown(self.caches, max(self.lengths))
        self._calls.clear()

    def following(self, tokens: Mapping[int, int], depth: int) -> dict[int, Row]:
        """See DraftHead; neighboring slots share a call."""
        made: dict[int, Row] = {}
        for reads in self._plan({slot: (token,) for slot, token in tokens.items()}):
            lengths = [self.lengths[read.slot] + (depth - 1 if read.logits else 0) for read in reads]
            made |= self._launch(reads, 1, lengths)
        return made

    def _first(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        made: dict[int, Row] = {}
        for reads in self._plan(tokens):
            if len(reads) == 1:
                made[reads[0].slot] = self._read(reads[0].slot, reads[0].ids, rows=1)
                continue
            T, row = max(len(read.ids) for read in reads), self._row_bytes
            for place, read in enumerate(reads):
                if read.logits:
                    target, at = (self._drafts, read.slot * row) if T == 1 else (self._input, place * T * row)
                    start = self._at(read.slot, self._read_to(read.slot) - self._bases[read.slot])
                    target.copy_from(self._log, at, start, len(read.ids) * row)
            made |= self._launch(reads, T, [self.lengths[read.slot] for read in reads])
            for read in reads:
                self.lengths[read.slot] += len(read.ids) if read.logits else 0
        return made

    def _plan(self, tokens: Mapping[int, Sequence[int]]) -> list[list[Read]]:
        """Which slots share a call. Between them may be some that draft nothing, with `logits` 0: those read a token where their text ends,
        which is never used."""
        slots, calls = sorted(tokens), []
        reads = [Read(slot, tokens[slot]) for slot in slots]
        for before, after in pairwise(slots):
            if after - before - 1 <= self._reader.idle_rows:
                reads += [Read(slot, (0,), logits=0) for slot in range(before + 1, after)]
        for call in plan_calls(reads, self._sharing, self.lengths, self._alone, self._room.rows):
            members = [reads[index] for index in call]
            drafting = [place for place, read in enumerate(members) if read.logits]
            if drafting:
                calls.append(members[drafting[0] : drafting[-1] + 1])
        return calls

    def _alone(self, slot: int) -> bool:
        """Whether a slot shares no call: it has rotary tables of its own, or tokens of pictures that the head has not read."""
        return self._tables.own(slot) or bool(self._seen[slot])

    def _launch(self, reads: Sequence[Read], T: int, lengths: Sequence[int]) -> dict[int, Row]:
        """One call over up to `T` rows of each of these slots, which leaves what their next drafts read."""
        first, b, row = reads[0].slot, len(reads), self._row_bytes
        shape = (first, b, T, 1, self._tables.own(first), 0)
        call = self._calls.get(shape) or self._bind(shape)
        counts = [len(read.ids) for read in reads]
        ids = [token for read in reads for token in (*read.ids, *(0,) * (T - len(read.ids)))]
        call.queue(ids, lengths, wanted_rows(T, counts, [1] * b, 1))
        if T == 1:
            self._keep(first, b, self._drafts_out, first * row)
        for place, read in enumerate(reads) if T > 1 else ():
            self._keep(read.slot, 1, self._output, (place * T + len(read.ids) - 1) * row)
        rows = call.finish()
        return {read.slot: rows[place] for place, read in enumerate(reads) if read.logits}

    def _keep(self, slot: int, count: int, source: Buffer, at: int) -> None:
        """The states of `count` slots from byte `at` of `source` on are what their next drafts read."""
        self._drafts.copy_from(source, slot * self._row_bytes, at, count * self._row_bytes)

    def _read_rows(self, slot: int, tokens: Sequence[int], at: int, rows: int) -> Row:
        row, made, start = self._row_bytes, Rows.none()[0], 0
        for size in self._parts(len(tokens), rows):
            places, seen = self._features(slot, start, size)
            shape = (slot, 1, size, rows, self._tables.own(slot), len(places))
            one = size == 1 and rows > 0
            target, place = (self._drafts, slot * row) if one else (self._input, 0)
            target.copy_from(self._log, place, at + start * row, size * row)
            call = self._calls.get(shape) or self._bind(shape)
            if places and self._pictures is not None:
                self._pictures.write(as_bytes(np.stack(seen)))
            call.queue(tokens[start : start + size], [self.lengths[slot] + start], places=places)
            if rows:
                self._keep(slot, 1, *((self._drafts_out, slot * row) if one else (self._output, (size - 1) * row)))
            made = call.finish()[0]
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
        first, b, T, rows, _, features = shape
        started = time.perf_counter()
        with self.session.uncounted():  # counted once, as time spent on bindings
            caches = {name: buffer.rows(first, b) for name, buffer in self.caches.items()}
            width = self._input.shape[-1]
            one = T == 1 and rows > 0
            hidden, out = (buffer.rows(first, b) for buffer in (self._drafts, self._drafts_out)) if one else (self._input, self._output)
            inputs = caches | self._tables.of(first) | {"hidden": hidden.part(hidden.dtype, (b, T, width))}
            if self._pictures is not None:
                inputs[FEATURES] = rows_of(self._pictures, features)
            outputs = {state.after: caches[state.name] for state in self.session.spec.states}
            outputs["hidden_out"] = out.part(out.dtype, (b, T, width))
            dims = {"B": b, "T": T, "N": b * rows, "S": self._room.rows, "K": features}
            comes_back = (rows > 0 or T in self._blocks) and not features
            call = BoundCall(self.session, dims, first, inputs, outputs, self._logits, repeated=comes_back)
            if call.recorded:
                # Recording runs the graph; what it writes, the real run behind it writes again.
                call.run([0] * (b * T), self.lengths[first : first + b])
        if comes_back:
            self._calls[shape] = call
        self.binding_s += time.perf_counter() - started
        return call
