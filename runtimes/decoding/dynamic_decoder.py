"""The decoder over one graph with dynamic shapes, which reads prompts, steps and drafts of any size.

All memory that is kept from call to call (states, caches, rotary tables, controls) is allocated once, and calls are bound to it. Graphs
write states and caches in place, so a step copies nothing and costs the same whatever the capacity. A call sees neighboring slots as one
piece of memory: no padding, and a call touches no other sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from qwen_export.bundle_contract import FEATURES
from qwen_export.manifest import Manifest
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.decoding.bound_call import BoundCall, LogitsMemory, wanted_rows
from qwen_export.runtimes.decoding.cache_room import CacheRoom
from qwen_export.runtimes.decoding.call_plan import Sharing, plan_calls
from qwen_export.runtimes.decoding.call_shape import PIECES, CallShape, prompt_piece
from qwen_export.runtimes.decoding.decoder import Decoder, Logits
from qwen_export.runtimes.decoding.dynamic_draft_head import DynamicDraftHead
from qwen_export.runtimes.decoding.features_memory import features_memory, rows_of
from qwen_export.runtimes.decoding.logit_rows import Rows
from qwen_export.runtimes.decoding.prompt_pieces import PromptPieces
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.decoding.recurrent_memory import recurrent_memory
from qwen_export.runtimes.decoding.rotary_tables import RotaryTables
from qwen_export.runtimes.decoding.sequence import Change
from qwen_export.runtimes.decoding.snapshot import CachePiece, Mark
from qwen_export.runtimes.decoding.transaction import Transaction
from qwen_export.runtimes.memory.buffers import Buffer, Bytes, as_bytes
from qwen_export.runtimes.memory.copies import DeviceCopies, HostCopies, Kept, put, put_back

_LOGIT_TOKENS = 32
# A call on the CPU costs as much as so many more rows of it; on CUDA rows are nearly free.
_CPU_IDLE_ROWS = 3
_WARM_ROWS = 8
"""Sequences up to which verifies in common are made ready before the first answer; with more, drafts rarely pay."""
_PADDING = {"cpu": _CPU_IDLE_ROWS, "cuda": 256}


class DynamicDecoder(Decoder):
    """`batch` slots over one loaded graph, each with room for `capacity` tokens. `head_session` is the draft head's graph."""

    head: DynamicDraftHead | None

    def __init__(
        self, session: Session, manifest: Manifest, batch: int = 1, capacity: int | None = None, head_session: Session | None = None
    ) -> None:
        super().__init__(manifest, batch, capacity, manifest.model["max_position_embeddings"])
        self.session, device, self.launches = session, session.device, session.records and session.queues
        self._piece = prompt_piece(device.kind, manifest, overlaps=session.overlaps)
        self.chunk = PIECES * self._piece if session.overlaps else self._piece
        self.idle_rows = batch if device.kind == "cuda" else _CPU_IDLE_ROWS
        self.logit_tokens = min(self.chunk, _LOGIT_TOKENS)
        self.widest_verify = 1 + manifest.speculation.max_draft if manifest.speculation else 0
        heads = head_session.spec.states if head_session is not None else ()
        caches = [spec for spec in (*session.spec.states, *heads) if spec.grows]
        self._room = CacheRoom(device, manifest, batch, self.capacity, caches)
        fixed = recurrent_memory(session, [spec for spec in session.spec.states if not spec.grows and not spec.pending], batch)
        self.states: dict[str, Buffer] = {
            spec.name: self._room.make(spec, session.device_of(spec.name)) if spec.grows else fixed[spec.name]
            for spec in session.spec.states
            if not spec.pending
        }
        self.tables = RotaryTables(manifest, session.spec.inputs, session.shared, max(self.capacity, self._room.rows))
        self._logits = LogitsMemory(session, batch, max(1, self.widest_verify))
        self._calls: dict[CallShape, BoundCall] = {}
        self._transaction = Transaction(session.spec, session, batch, max(1, self.widest_verify), self._piece)
        inputs = {tensor.name for tensor in session.spec.inputs}
        self._sharing = Sharing.of(inputs, _PADDING[device.kind], self._piece, recurrent=bool(self._fixed()))
        self.shares_pasts = self._sharing.pasts
        hidden = next((tensor for tensor in session.spec.outputs if tensor.name == "hidden"), None)
        # One for each of the calls that run at a time: a piece of a prompt per stage, and one that waits.
        turns = 1 + len({session.stage_of(name) for name in self.states}) if session.overlaps else 1
        shape = (max(self._piece, batch), int(hidden.shape[-1]) if hidden else 0)
        self._hidden = [session.device_of("hidden").buffer(hidden.dtype, shape) for _ in range(turns)] if hidden else []
        self._pieces = PromptPieces(self._piece, turns, self._hidden, self.tables, self._transaction, self._call)
        self._features = features_memory(session, self._piece)
        self.sees = self._features is not None
        self.head = (
            DynamicDraftHead(head_session, self, self.tables, self._room, self._sharing.padding) if head_session is not None else None
        )

    def read(self, ids: Sequence[int], slot: int = 0) -> Logits:
        """Read at most `chunk` tokens; returns the logits of all of them, f32[T,V]."""
        parts = [ids[start : start + self._piece] for start in range(0, max(1, len(ids)), self._piece)]
        if len(parts) == 1:
            return self.run([Read(slot, ids, logits=len(ids))])[0].array
        return np.concatenate([self.run([Read(slot, part, logits=len(part))])[0].array.copy() for part in parts])

    def plan(self, reads: Sequence[Read]) -> list[list[int]]:
        return plan_calls(reads, self._sharing, self.lengths, self.tables.own, self._room.rows)

    def _run(self, reads: Sequence[Read]) -> list[Rows]:
        results = [Rows.none()] * len(reads)
        for call in self.plan(reads):
            for index, rows in zip(call, self._execute([reads[index] for index in call]), strict=True):
                results[index] = rows
        return results

    def launch(self, tokens: Sequence[int], first: int = 0) -> Callable[[], Rows]:
        b, slots = len(tokens), range(first, first + len(tokens))
        sequences = self.sequences[first : first + b]
        usable = b > 0 <= first and len(sequences) == b and min(tokens) >= 0 and max(tokens) < self._vocabulary
        lengths = [len(sequence.tokens) for sequence in sequences if sequence.settled]
        if not usable or len(lengths) < b or max(lengths) >= self.capacity or self.tables.any_own(slots):
            return super().launch(tokens, first)
        self._make_room(max(lengths) + 1, first + lengths.index(max(lengths)))
        self._room.reach_all(slots, lengths, max(1, self.widest_verify), self.capacity)
        change = Change(sequences).begin()
        if self.head is not None:
            self.head.begin_step(slots)
        pending, stride = self._transaction.gather(slots)
        call = self._call(CallShape(b, 1, 1, first, True, pending, stride or self._transaction.width))
        call.queue(tokens, lengths, accepted=self._transaction.accepted[first : first + b], commit=[1] * b)
        # Bookkeeping while a GPU works. Should the call fail, the sequences are of no defined text anyway.
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.tokens.append(token)
            sequence.open = 0
        self._transaction.accepted[first : first + b] = [0] * b
        if self.head is not None and self._hidden:
            self.head.end_step(slots, self._hidden[0])

        def landed() -> Rows:
            rows = call.finish()
            if self.observer is not None:
                self.observer(lengths[0], 1, call.results)
            change.end()
            return rows

        return landed

    def _execute(self, reads: Sequence[Read]) -> list[Rows]:
        """One call: a read, or reads of neighboring slots. Those with fewer tokens than others are padded."""
        one, b, counts = reads[0], len(reads), [len(read.ids) for read in reads]
        if b == 1 and counts[0] > self._piece and not one.places:
            return [self._pieces.read(one, self.sequences[one.slot], self.head)]
        if b == 1 and counts[0] > self._piece:  # features have memory for one call
            return [self._execute([part])[0] for part in one.parts(self._piece, self.sequences[one.slot].length)][-1:]
        first, slots, T = one.slot, range(one.slot, one.slot + b), max(counts)
        sequences = self.sequences[first : first + b]
        with Change(sequences):
            pending, stride = self._transaction.gather(slots)
            leaves = 0 if one.commit else self._transaction.make_way(pending, slots, T)
        if not leaves and not one.commit:
            return [rows for read in reads for rows in self._execute([read])]
        with Change(sequences):
            for slot, count in zip(slots, counts, strict=True):
                if b > 1 and count < T:
                    self._make_room(self.sequences[slot].length + T, slot)
                if self.head is not None:
                    self.head.reserve(slot, count)
                if one.positions is not None or self.tables.own(slot):
                    self.tables.place(slot, self.sequences[slot].length, one.positions, T)
            own, logits = self.tables.own(first), max(read.logits for read in reads)
            stride = stride or leaves or self._transaction.width
            shape = CallShape(b, T, logits, first, one.commit, pending, stride, leaves, own, features=len(one.places))
            call = self._call(shape)
            if one.features is not None and self._features is not None:
                self._features.write(as_bytes(one.features))
            begin = sequences[0].length
            if b == 1:
                self._queue(call, shape, one.ids, counts, places=one.places)
            else:
                ids = [token for read in reads for token in (*read.ids, *(0,) * (T - len(read.ids)))]
                self._queue(call, shape, ids, counts, [read.logits for read in reads])
            for place, (slot, sequence, read) in enumerate(zip(slots, sequences, reads, strict=True)):
                if self.head is not None and read.features is not None:
                    self.head.see(slot, sequence.length, read.features, read.places)
                sequence.extend(read.ids, read.media, commit=read.commit)
                if read.commit:
                    self._transaction.committed(slot)
                else:
                    self._transaction.opened(slot, pending, len(read.ids))
                if self.head is not None and self._hidden:
                    self.head.append(slot, self._hidden[0], place * T, len(read.ids))
            rows = call.finish()
            if self.observer is not None:
                self.observer(begin, T, call.results)
        return [rows.part(place * shape.rows, read.logits if b > 1 else None) for place, read in enumerate(reads)]

    def _queue(
        self,
        call: BoundCall,
        shape: CallShape,
        ids: Sequence[int],
        counts: Sequence[int],
        logits: Sequence[int] | None = None,
        places: Sequence[int] = (),
    ) -> None:
        slots = range(shape.first, shape.first + shape.b)
        call.queue(
            ids,
            [self.sequences[slot].length for slot in slots],
            logits and wanted_rows(shape.T, counts, logits, shape.rows),
            accepted=[self._transaction.accepted[slot] for slot in slots],
            commit=counts if shape.commit else [0] * shape.b,
            places=places,
        )

    def _accept(self, count: int, slot: int) -> None:
        self._transaction.accepted[slot] = count

    def prepare(self, count: int) -> None:
        """See Decoder; before a verify the draft head also reads what plain steps have left it."""
        if count > 1 and self.head is not None:
            self.head.prepare_round()
        if count > max(1, self.widest_verify) or (count > 1 and self.batch > 1):
            return
        # Verifies read the two sets of pending inputs alternating, steps whichever the last verify has left.
        for pending in (0, 1) if self.widest_verify else (0,):
            width, leaves = self._transaction.width, self._transaction.width if count > 1 else 0
            shape = CallShape(self.batch if count == 1 else 1, count, count, 0, count == 1, pending, width, leaves, self.tables.own(0))
            if shape not in self._calls:
                self._make_room(min(self.capacity, max(self.lengths) + count), 0)
                self._bind(shape)

    def warm(self, drafts: int | None = None) -> None:
        longest = (self.widest_verify if self.head is not None else 1) if drafts is None else min(1 + drafts, self.widest_verify)
        if self.batch == 1:
            mark = self.mark()
            self.prefill([0], want_logits=False)
            for count in range(1, 1 + max(1, longest)):
                self.prepare(count)
            self.rewind(mark)
        else:
            for pending in (0, 1) if longest > 1 else (0,):
                for count in sorted({1 << power for power in range(self.batch.bit_length())} | {self.batch}):
                    shapes = [CallShape(count, 1, 1, 0, True, pending, self._transaction.width)]
                    if self.shares_pasts and count <= _WARM_ROWS:
                        shapes += [CallShape(count, T, T, 0, False, pending, T, T) for T in range(2, longest + 1)]
                    for shape in shapes:
                        if shape not in self._calls:
                            self._bind(shape)
        if self.head is not None and longest > 1:
            self.head.prepare(longest, min(self.batch, _WARM_ROWS) if self.shares_pasts else 1)

    @property
    def records(self) -> bool:
        return self.session.records

    @property
    def busy_s(self) -> float:
        return self.session.busy_s + (self.head.busy_s if self.head is not None else 0.0)

    def release(self, slot: int = 0) -> None:
        self.reset(slot)
        self._room.release(slot, self._caches().values())

    @property
    def cache_rows(self) -> int:
        """S of the caches."""
        return self._room.rows

    @property
    def fixed_bytes(self) -> int:
        states = sum(self.states[name].row_bytes for name in self._fixed()) + self._transaction.slot_bytes
        waiting = self.head.slot_bytes if self.head is not None else 0
        return self.batch * (states + waiting + self._room.fixed_bytes())

    def growing_bytes(self, length: int) -> int:
        return self._room.bytes_for(length)

    @property
    def free_bytes(self) -> int | None:
        return self._room.free_bytes()

    def held_bytes(self, slot: int) -> int:
        return super().held_bytes(slot) if not self.on_gpu else self._room.held_bytes(slot)

    @property
    def on_gpu(self) -> bool:
        return not self.session.device.is_host

    # ---- states ----

    def _mark(self, slot: int, waiting: Bytes, on_device: bool) -> Mark:
        sequence = self.sequences[slot]
        fixed = {name: self.states[name] for name in self._fixed()}
        pending = self._transaction.held(slot)
        places = {name: (buffer, slot * buffer.row_bytes, buffer.row_bytes) for name, buffer in fixed.items()} | pending
        copies = self._copies(sum(nbytes for _, _, nbytes in places.values()), on_device)
        copied = {name: copies.rows(buffer, offset, 0, nbytes, 1) for name, (buffer, offset, nbytes) in places.items()}
        return Mark(
            tuple(sequence.tokens),
            {name: copied[name] for name in fixed},
            self._transaction.accepted[slot],
            {name: copied[name] for name in pending},
            waiting,
            sequence.media,
            self.tables.positions(slot, sequence.length),
        )

    def _load(self, mark: Mark, slot: int) -> None:
        for name in self._fixed():
            buffer = self.states[name]
            if name in mark.states:
                put(buffer, slot * buffer.row_bytes, 0, mark.states[name])
            else:
                buffer.zero(slot * buffer.row_bytes, buffer.row_bytes)
        self._transaction.load(slot, mark.accepted, mark.pending)
        self.tables.restore(slot, mark.positions)

    def _save_caches(self, slot: int, start: int, on_device: bool) -> dict[str, Kept]:
        """Only the rows that are used are touched: a capacity that no text has reached costs nothing."""
        count, made = self.sequences[slot].length - start, {}
        layouts = {name: (buffer, *self._layout(buffer)) for name, buffer in self._caches().items()}
        copies = self._copies(sum(heads * width for _, heads, _, width in layouts.values()) * count, on_device)
        for name, (buffer, heads, run, width) in layouts.items():
            kept = copies.rows(buffer, slot * buffer.row_bytes + start * width, run, count * width, heads)
            made[name] = kept if isinstance(kept, Buffer) else kept.reshape(heads, count, width)
        return made

    def _load_caches(self, piece: CachePiece, slot: int) -> None:
        for name, buffer in self._caches().items():
            heads, run, width = self._layout(buffer)
            put(buffer, slot * buffer.row_bytes + piece.start * width, run, piece.rows[name], heads)

    def _copies(self, nbytes: int, on_device: bool) -> HostCopies:
        """Where states are on several devices, copies go through the host."""
        one_gpu = self.session.device.kind == "cuda" and len({self.session.device_of(name) for name in self.states}) == 1
        return DeviceCopies(nbytes, self.session.device.index) if on_device and one_gpu else HostCopies()

    def _cache_names(self) -> list[str]:
        return list(self._caches())

    def _fixed(self) -> list[str]:
        return [spec.name for spec in self.session.spec.states if not spec.grows and not spec.pending]

    def _growing(self) -> list[str]:
        return [spec.name for spec in self.session.spec.states if spec.grows]

    def _caches(self) -> dict[str, Buffer]:
        """Attention caches by name, the draft head's among them."""
        heads = {f"mtp.{name}": buffer for name, buffer in self.head.caches.items()} if self.head is not None else {}
        return {name: self.states[name] for name in self._growing()} | heads

    def _layout(self, buffer: Buffer) -> tuple[int, int, int]:
        """Of a cache [B,Hkv,S,D]: heads, bytes of one head of a sequence, and bytes of one of its rows."""
        heads = buffer.shape[1]
        run = buffer.row_bytes // heads
        return heads, run, run // self._room.rows

    def _make_room(self, length: int, slot: int) -> None:
        """Have rotary tables and cache rows for `length` tokens of a slot, and for drafts behind them."""
        length = min(self.capacity, max(length, self.sequences[slot].length + self.widest_verify))
        self.tables.fill(length)
        self._room.reach(slot, length)
        if not self._room.together or length <= self._room.rows:
            return
        for name, cache in self._room.double(length, {name: self.states[name] for name in self._growing()}, max(self.lengths)).items():
            self.states[name] = cache
        if self.head is not None:
            self.head.grow()
        self._calls.clear()

    # ---- calls ----

    def _call(self, shape: CallShape) -> BoundCall:
        return self._calls.get(shape) or self._bind(shape)

    def _bind(self, shape: CallShape) -> BoundCall:
        """Make the bindings for calls of one shape; others that do not come back are dropped."""
        started = time.perf_counter()
        for old in [s for s in self._calls if not s.comes_back(self._piece)]:
            del self._calls[old]
        with self.session.uncounted():  # counted once, as time spent on bindings
            call = self._bound(shape)
            if call.recorded:
                self._record(call, shape)
        self._calls[shape] = call
        self._binding_s += time.perf_counter() - started
        return call

    def _record(self, call: BoundCall, shape: CallShape) -> None:
        """Recording runs the graph. What that changes is put back: the states of the call's slots, and what is pending in them."""
        slots = range(shape.first, shape.first + shape.b)
        fixed = [self.states[name] for name in self._fixed()]
        places = [(buffer, shape.first * buffer.row_bytes, shape.b * buffer.row_bytes) for buffer in fixed]
        places += [place for slot in slots for place in self._transaction.held(slot).values()]
        with put_back(places):
            self._queue(call, shape, [0] * (shape.b * shape.T), [shape.T] * shape.b)
            call.finish()

    def _bound(self, shape: CallShape) -> BoundCall:
        dims = {"B": shape.b, "T": shape.T, "N": shape.b * shape.rows, "S": self._room.rows, "P": shape.stride, "K": shape.features}
        states = {name: buffer.rows(shape.first, shape.b) for name, buffer in self.states.items()}
        if self._features is not None:
            states[FEATURES] = rows_of(self._features, shape.features)
        inputs = states | self.tables.of(shape.first) | self._transaction.inputs(shape.pending, shape.stride, shape.first, shape.b)
        outputs = {state.after: states[state.name] for state in self.session.spec.states if not state.pending}
        outputs |= self._transaction.outputs(shape.pending, shape.leaves, shape.first, dims)
        if self._hidden:
            hidden = self._hidden[shape.turn]
            outputs["hidden"] = hidden.part(hidden.dtype, (shape.b, shape.T, hidden.shape[-1]))
        repeated = shape.repeats(self.batch, self._transaction.width)
        return BoundCall(self.session, dims, shape.first, inputs, outputs, self._logits, repeated=repeated)
