"""The decoder over one graph with dynamic shapes, which reads prompts, steps and drafts of any size.

All memory that is kept from call to call (states, caches, rotary tables, controls) is allocated once, and calls are bound to it. Graphs
write states and caches in place, so a step copies nothing and costs the same whatever the capacity. A call sees neighboring slots as one
piece of memory: no padding, and a call touches no other sequence.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from qwen_export.manifest import Manifest
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.decoding.bound_call import BoundCall, LogitsMemory
from qwen_export.runtimes.decoding.cache_room import CacheRoom
from qwen_export.runtimes.decoding.call_plan import plan_calls
from qwen_export.runtimes.decoding.decoder import Decoder, Logits
from qwen_export.runtimes.decoding.dynamic_draft_head import DynamicDraftHead
from qwen_export.runtimes.decoding.logit_rows import Rows
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.decoding.rotary_tables import RotaryTables
from qwen_export.runtimes.decoding.sequence import Change
from qwen_export.runtimes.decoding.snapshot import CachePiece, Mark
from qwen_export.runtimes.decoding.transaction import Transaction
from qwen_export.runtimes.memory.buffers import Buffer, Bytes
from qwen_export.runtimes.memory.copies import DeviceCopies, HostCopies, Kept, put, settle

# Tokens per prefill call: enough to keep matrix products busy, few enough to bound the activations.
PREFILL_CHUNK = {"cpu": 256, "cuda": 2048}
# Quantized products are at full speed from fewer on; calls of a mixture of experts are split over the experts, and need more.
_QUANTIZED_CHUNK, _MOE_CHUNK = 96, 512
# A call on the CPU costs as much as so many more rows of it; on CUDA rows are nearly free.
_CPU_IDLE_ROWS = 3


class CallShape(NamedTuple):
    """`b` sequences from slot `first` on, `T` new tokens each, logits of the last `rows`. `commit`: the tokens enter the state.
    `pending`: the set of pending inputs that the call reads. `own`: its sequence has rotary tables of its own."""

    b: int
    T: int
    rows: int
    first: int
    commit: bool = True
    pending: int = 0
    own: bool = False


class DynamicDecoder(Decoder):
    """`batch` slots over one loaded graph, each with room for `capacity` tokens. `head_session` is the draft head's graph."""

    head: DynamicDraftHead | None

    def __init__(
        self, session: Session, manifest: Manifest, batch: int = 1, capacity: int | None = None, head_session: Session | None = None
    ) -> None:
        super().__init__(manifest, batch, capacity, manifest.model["max_position_embeddings"])
        self.session, device = session, session.device
        self.chunk = _chunk(device.kind, manifest)
        self.idle_rows = batch if device.kind == "cuda" else _CPU_IDLE_ROWS
        self.widest_verify = 1 + manifest.speculation.max_draft if manifest.speculation else 0
        heads = head_session.spec.states if head_session is not None else ()
        caches = [spec for spec in (*session.spec.states, *heads) if spec.grows]
        self._room = CacheRoom(device, manifest, batch, self.capacity, caches)
        self.states: dict[str, Buffer] = {
            spec.name: self._room.make(spec)
            if spec.grows
            else device.buffer(spec.dtype, tuple(d if isinstance(d, int) else batch for d in spec.shape))
            for spec in session.spec.states
            if not spec.pending
        }
        self.tables = RotaryTables(manifest, session.spec.inputs, session.buffer, max(self.capacity, self._room.rows))
        self._logits = LogitsMemory(session, batch, max(1, self.widest_verify))
        self._calls: dict[CallShape, BoundCall] = {}
        self._transaction = Transaction(session.spec, device, batch, max(1, self.widest_verify), self.chunk)
        hidden = next((tensor for tensor in session.spec.outputs if tensor.name == "hidden"), None)
        self._hidden = device.buffer(hidden.dtype, (max(self.chunk, batch), int(hidden.shape[-1]))) if hidden else None
        self.head = DynamicDraftHead(head_session, self, self.tables, self._room) if head_session is not None else None

    def read(self, ids: Sequence[int], slot: int = 0) -> Logits:
        """Read at most `chunk` tokens in one call; returns the logits of all of them, f32[T,V]."""
        [rows] = self.run([Read(slot, ids, logits=len(ids))])
        return rows.array

    def _run(self, reads: Sequence[Read]) -> list[Rows]:
        results = [Rows.none()] * len(reads)
        for call in plan_calls(reads, self.tables.own, lambda slot: not self.sequences[slot].tokens, self.chunk):
            rows = self._execute([reads[index] for index in call])
            for place, index in enumerate(call):
                results[index] = rows.part(place * reads[index].logits)
        return results

    def _execute(self, reads: Sequence[Read]) -> Rows:
        """One call: a read, or reads of neighboring slots that are as long."""
        one, b, T = reads[0], len(reads), len(reads[0].ids)
        first, slots = one.slot, range(one.slot, one.slot + b)
        sequences = self.sequences[first : first + b]
        with Change(sequences):
            for slot in slots:
                if self.head is not None:
                    self.head.reserve(slot, T)
                if one.positions is not None or self.tables.own(slot):
                    self.tables.place(slot, self.sequences[slot].length, one.positions, T)
            pending = self._transaction.gather(slots)
            shape = CallShape(b, T, one.logits, first, one.commit, pending, self.tables.own(first))
            call = self._calls.get(shape) or self._bind(shape)
            rows = self._launch(call, shape, one.ids if b == 1 else [token for read in reads for token in read.ids])
            if self.observer is not None:
                self.observer(sequences[0].length, T, call.results)
            for place, (slot, sequence, read) in enumerate(zip(slots, sequences, reads, strict=True)):
                sequence.extend(read.ids, read.media, commit=read.commit)
                if read.commit:
                    self._transaction.committed(slot)
                else:
                    self._transaction.opened(slot, pending, T)
                if self.head is not None and self._hidden is not None:
                    self.head.append(slot, self._hidden, place, T)
        return rows

    def _launch(self, call: BoundCall, shape: CallShape, ids: Sequence[int]) -> Rows:
        slots = range(shape.first, shape.first + shape.b)
        return call.run(
            ids,
            [self.sequences[slot].length for slot in slots],
            accepted=[self._transaction.accepted[slot] for slot in slots],
            commit=[shape.T if shape.commit else 0] * shape.b,
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
            shape = CallShape(self.batch if count == 1 else 1, count, count, 0, count == 1, pending, self.tables.own(0))
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
                    shape = CallShape(count, 1, 1, 0, True, pending)
                    if shape not in self._calls:
                        self._bind(shape)
        if self.head is not None and longest > 1:
            self.head.prepare(longest)

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
        fixed = {name: self.states[name] for name in self._fixed()} | self._transaction.held(slot)
        copies = self._copies(sum(buffer.row_bytes for buffer in fixed.values()), on_device)
        copied = {name: copies.rows(b, slot * b.row_bytes, 0, b.row_bytes, 1) for name, b in fixed.items()}
        copies.done()
        return Mark(
            tuple(sequence.tokens),
            {name: copied[name] for name in self._fixed()},
            self._transaction.accepted[slot],
            {name: copied[name] for name in self._transaction.held(slot)},
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
        settle(self.session.device)
        self.tables.restore(slot, mark.positions)

    def _save_caches(self, slot: int, start: int, on_device: bool) -> dict[str, Kept]:
        """Only the rows that are used are touched: a capacity that no text has reached costs nothing."""
        count, made = self.sequences[slot].length - start, {}
        layouts = {name: (buffer, *self._layout(buffer)) for name, buffer in self._caches().items()}
        copies = self._copies(sum(heads * width for _, heads, _, width in layouts.values()) * count, on_device)
        for name, (buffer, heads, run, width) in layouts.items():
            kept = copies.rows(buffer, slot * buffer.row_bytes + start * width, run, count * width, heads)
            made[name] = kept if isinstance(kept, Buffer) else kept.reshape(heads, count, width)
        copies.done()
        return made

    def _load_caches(self, piece: CachePiece, slot: int) -> None:
        for name, buffer in self._caches().items():
            heads, run, width = self._layout(buffer)
            put(buffer, slot * buffer.row_bytes + piece.start * width, run, piece.rows[name], heads)
        settle(self.session.device)

    def _copies(self, nbytes: int, on_device: bool) -> HostCopies:
        return DeviceCopies(nbytes, self.session.device.index) if on_device and self.session.device.kind == "cuda" else HostCopies()

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

    def _bind(self, shape: CallShape) -> BoundCall:
        """Make the bindings for calls of one shape. Steps, drafts, whole chunks and powers of two come back; odd sizes of prompts' ends are
        dropped."""
        started = time.perf_counter()
        for old in [s for s in self._calls if not self._comes_back(s)]:
            del self._calls[old]
        with self.session.uncounted():  # counted once, as time spent on bindings
            call = self._bound(shape)
            if call.recorded:
                self._record(call, shape)
        self._calls[shape] = call
        self._binding_s += time.perf_counter() - started
        return call

    def _comes_back(self, shape: CallShape) -> bool:
        return not shape.commit or shape.T in (1, self.chunk) or _is_power(shape.T)

    def _repeats(self, shape: CallShape) -> bool:
        """Whether a call is worth recording: a verify, or a step of all sequences or the first 1, 2, 4, 8, ..."""
        step = shape.T == 1 and shape.rows == 1 and shape.first == 0
        return not shape.commit or (step and (shape.b == self.batch or _is_power(shape.b)))

    def _record(self, call: BoundCall, shape: CallShape) -> None:
        """Recording runs the graph several times. What those runs change is put back: the states of the call's slots, and what is pending
        in them."""
        slots = range(shape.first, shape.first + shape.b)
        fixed = [self.states[name] for name in self._fixed()]
        places = [(buffer, shape.first * buffer.row_bytes, shape.b * buffer.row_bytes) for buffer in fixed]
        pending = [(buffer, slot) for slot in slots for buffer in self._transaction.held(slot).values()]
        places += [(buffer, slot * buffer.row_bytes, buffer.row_bytes) for buffer, slot in pending]
        kept = []
        for buffer, offset, nbytes in places:
            copy = self.session.buffer("uint8", (nbytes,))
            copy.copy_from(buffer, 0, offset, nbytes)
            kept.append((buffer, offset, copy))
        try:
            self._launch(call, shape, [0] * (shape.b * shape.T))
        finally:
            for buffer, offset, copy in kept:
                buffer.copy_from(copy, offset, 0, copy.nbytes)

    def _bound(self, shape: CallShape) -> BoundCall:
        dims = {"B": shape.b, "T": shape.T, "N": shape.b * shape.rows, "S": self._room.rows, "P": self._transaction.width}
        states = {name: buffer.rows(shape.first, shape.b) for name, buffer in self.states.items()}
        inputs = states | self.tables.of(shape.first) | self._transaction.inputs(shape.pending, shape.first, shape.b)
        outputs = {state.after: states[state.name] for state in self.session.spec.states if not state.pending}
        outputs |= self._transaction.outputs(shape.pending, shape.first, dims, commit=shape.commit)
        if self._hidden is not None:
            outputs["hidden"] = self._hidden.part(self._hidden.dtype, (shape.b, shape.T, self._hidden.shape[-1]))
        return BoundCall(self.session, dims, shape.first, inputs, outputs, self._logits, repeated=self._repeats(shape))


def _is_power(count: int) -> bool:
    """Whether it is a power of two."""
    return count & (count - 1) == 0


def _chunk(device: str, manifest: Manifest) -> int:
    """Tokens per prefill call."""
    if device == "cpu" and manifest.model.get("num_experts"):
        return _MOE_CHUNK
    if device == "cpu" and manifest.target.precision in ("int8", "int4"):
        return _QUANTIZED_CHUNK
    return PREFILL_CHUNK[device]
