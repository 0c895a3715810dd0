"""The decoder over one graph with dynamic shapes, which reads prompts, steps and drafts of any size.

All memory that lives from call to call (states, caches, rotary tables, controls) is allocated once and bound by address. Graphs write
states and caches in place, so a step copies nothing and costs the same whatever the capacity.

A batch has B sequences of their own lengths. Prompts are read one sequence at a time, through bindings that see that sequence's part of
every buffer: no padding, and a prompt's tokens touch no other sequence. Steps advance all sequences together, one token each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwen_export.errors import QwenExportError
from qwen_export.manifest import Manifest
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_session import Session
from qwen_export.runtimes.decoding.bound_call import BoundCall, LogitsMemory
from qwen_export.runtimes.decoding.decoder import Decoder, Logits, Mark, Snapshot, rotary_rows
from qwen_export.runtimes.decoding.dynamic_draft_head import DynamicDraftHead
from qwen_export.runtimes.decoding.logit_rows import Rows
from qwen_export.runtimes.decoding.transaction import Transaction
from qwen_export.runtimes.memory.buffers import BUFFERS, Buffer, Bytes, CudaBuffer, HostBuffer

# Tokens per prefill call: enough to keep matrix products busy, few enough to bound the activations.
PREFILL_CHUNK = {"cpu": 256, "cuda": 2048}
# Quantized products are at full speed from fewer on; calls of a mixture of experts are split over the experts, and want more.
_QUANTIZED_CHUNK, _MOE_CHUNK = 96, 512
# CUDA attention costs by the slots allocated, not by the tokens in them: caches start small there and double.
_FIRST_SLOTS = 2048
_SLOT_AXIS = 2
_TABLE_ROWS = 1024
_LONG_TEXT = 8192


class CallShape(NamedTuple):
    """`b` sequences from row `first` of every buffer, `T` new tokens each, logits of the last `rows`. `repeated`: a step, or a verify,
    which does not `commit`. `pending`: the set of pending inputs that it reads."""

    b: int
    T: int
    rows: int
    first: int
    repeated: bool
    commit: bool = True
    pending: int = 0


class DynamicDecoder(Decoder):
    """`batch` sequences over one loaded graph, each with room for `capacity` tokens. `head_session` is the draft head's graph, for a
    single sequence."""

    head: DynamicDraftHead | None

    def __init__(
        self, session: Session, manifest: Manifest, batch: int = 1, capacity: int | None = None, head_session: Session | None = None
    ) -> None:
        super().__init__(manifest, batch, capacity, manifest.model["max_position_embeddings"])
        self.session = session
        self.chunk = _chunk(session.device, manifest)
        self.slots = min(self.capacity, _FIRST_SLOTS) if session.device == "cuda" else self.capacity
        self.widest_verify = 1 + manifest.speculation.max_draft if manifest.speculation else 0
        kind = BUFFERS[session.device]
        dims = {"B": batch, "S": self.slots}
        self.states: dict[str, Buffer] = {
            spec.name: kind(spec.dtype, tuple(d if isinstance(d, int) else dims[d] for d in spec.shape))
            for spec in session.spec.states
            if not spec.pending
        }
        for buffer in map(self.states.__getitem__, self._cache_names()):
            if isinstance(buffer, HostBuffer):
                buffer.prefer_huge_pages(_SLOT_AXIS, _LONG_TEXT)
        half = len(manifest.rotary.inv_freq)
        self.tables = {spec.name: kind(spec.dtype, (self.capacity, half)) for spec in session.spec.inputs if spec.name in ("cos", "sin")}
        self._table_rows = 0
        self._logits = LogitsMemory(session, max(batch, self.widest_verify))
        self._calls: dict[CallShape, BoundCall] = {}
        self._transaction = Transaction(session.spec, kind, batch, max(1, self.widest_verify), self.chunk)
        hidden = next((tensor for tensor in session.spec.outputs if tensor.name == "hidden"), None)
        self._hidden = kind(hidden.dtype, (max(self.chunk, batch), int(hidden.shape[-1]))) if hidden else None
        self.head = DynamicDraftHead(head_session, self) if head_session is not None and batch == 1 else None

    def _prefill(self, ids: Sequence[int], sequence: int, chunk: int, want_logits: bool) -> Logits:
        last = len(ids) - 1 - (len(ids) - 1) % chunk
        for start in range(0, last, chunk):
            self._run([ids[start : start + chunk]], sequence, 0)
        return self._run([ids[last:]], sequence, int(want_logits)).array.reshape(-1)

    def read(self, ids: Sequence[int], sequence: int = 0) -> Logits:
        """Read at most `chunk` tokens in one call; returns the logits of all of them, f32[T,V]."""
        self._check_room(sequence, len(ids))
        return self._run([ids], sequence, len(ids)).array

    def step_rows(self, tokens: Sequence[int]) -> Rows:
        for sequence in range(self.batch):
            self._check_room(sequence, 1)
        return self._run([[token] for token in tokens], None, 1)

    def _verify(self, tokens: Sequence[int], sequence: int) -> Rows:
        if self.batch > 1:
            raise QwenExportError("drafts are verified in one sequence", got=f"a batch of {self.batch}", fix="Take a decoder per sequence.")
        return self._run([tokens], sequence, len(tokens), commit=False)

    def _accept(self, count: int, sequence: int) -> None:
        self._transaction.accepted[sequence] = count

    def prepare(self, count: int) -> None:
        """As promised; before a verify the draft head also reads what plain steps have left it."""
        if count > 1 and self.head is not None and self.head.behind > self.widest_verify:
            self.head.catch_up()
        if self.batch > 1 or count > max(1, self.widest_verify):
            return
        if count > 1 and self.head is not None:
            self.head.prepare()
        current = self._transaction.current
        # Verifies read the two sets of pending inputs by turns, steps whichever the last verify has left.
        for pending in (current, 1 - current) if self.widest_verify else (current,):
            shape = CallShape(1, count, count, 0, True, count == 1, pending)
            if shape not in self._calls:
                self._make_room(min(self.capacity, self.lengths[0] + count))
                self._bind(shape)

    def warm(self) -> None:
        super().warm()
        if self.head is not None:
            self.head.prepare(self.widest_verify)

    @property
    def busy_s(self) -> float:
        return self.session.busy_s + (self.head.busy_s if self.head is not None else 0.0)

    def mark(self, sequence: int = 0) -> Mark:
        waiting = self.head.save() if self.head is not None else np.zeros(0, np.uint8)
        return self._mark(sequence, waiting)

    def _mark(self, sequence: int, waiting: Bytes) -> Mark:
        states = {name: self.states[name].read_row(sequence) for name in self._fixed_names()}
        accepted = self._transaction.accepted[sequence]
        return Mark(self.tokens(sequence), states, accepted, self._transaction.save(sequence), waiting)

    def _load(self, mark: Mark, sequence: int) -> None:
        for name in self._fixed_names():
            buffer = self.states[name]
            buffer.write_row(sequence, mark.states.get(name, np.zeros(buffer.row_bytes, np.uint8)))
        self._transaction.load(sequence, mark.accepted, mark.pending)

    def snapshot(self, sequence: int = 0) -> Snapshot:
        mark, used = self.mark(sequence), len(self._tokens[sequence])
        return Snapshot(
            mark, {name: np.ascontiguousarray(self._cache_rows(b, b.read_row(sequence))[:, :used]) for name, b in self._caches().items()}
        )

    def _load_caches(self, snapshot: Snapshot, sequence: int) -> None:
        length = len(snapshot.mark.tokens)
        for name, buffer in self._caches().items():
            if name not in snapshot.caches:
                raise QwenExportError(
                    "the snapshot was taken without the draft head",
                    fix="Take it from a decoder that drafts, or restore it into one that does not.",
                )
            row = buffer.read_row(sequence)
            self._cache_rows(buffer, row)[:, :length] = snapshot.caches[name]
            buffer.write_row(sequence, row)

    def _fixed_names(self) -> list[str]:
        return [spec.name for spec in self.session.spec.states if not spec.grows and not spec.pending]

    def _cache_names(self) -> list[str]:
        return [spec.name for spec in self.session.spec.states if spec.grows]

    def _caches(self) -> dict[str, Buffer]:
        """Attention caches by name, the draft head's among them."""
        heads = {f"mtp.{name}": buffer for name, buffer in self.head.caches.items()} if self.head is not None else {}
        return {name: self.states[name] for name in self._cache_names()} | heads

    def _cache_rows(self, buffer: Buffer, row: Bytes) -> Bytes:
        """One sequence's cache [Hkv,S,D] as bytes [Hkv,S,D * element size]."""
        return row.reshape(buffer.shape[1], self.slots, -1)

    def _fill_tables(self, length: int) -> None:
        """Make the rows of the rotary tables for the first `length` slots, and some that drafts and the next calls will want."""
        if length <= self._table_rows:
            return
        rows = min(self.capacity, length + _TABLE_ROWS)
        for start in range(self._table_rows, rows, _TABLE_ROWS):
            stop = min(rows, start + _TABLE_ROWS)
            for name, table in self.tables.items():
                table.write(rotary_rows(self.manifest, name, start, stop, table.dtype), start * table.row_bytes)
        self._table_rows = rows

    def _make_room(self, length: int) -> None:
        """Have rotary tables for `length` tokens, and slots: those are doubled until they fit, which happens on CUDA only, a few times in a
        long conversation."""
        self._fill_tables(min(self.capacity, length + self.widest_verify))
        if length <= self.slots:
            return
        slots = self.slots
        while slots < length:
            slots *= 2
        slots = min(slots, self.capacity)
        for name in self._cache_names():
            buffer = self.states[name]
            if not isinstance(buffer, CudaBuffer):
                raise AssertionError("host caches have their full size from the start")
            self.states[name] = buffer.grown(_SLOT_AXIS, slots, max(self.lengths))
        self.slots = slots
        if self.head is not None:
            self.head.grow(slots)
        self._calls.clear()

    def _run(self, ids: Sequence[Sequence[int]], sequence: int | None, rows: int, *, commit: bool = True) -> Rows:
        """One call over `ids` [b,T]: all sequences, or one; logits of the last `rows` tokens of each."""
        members = range(self.batch) if sequence is None else [sequence]
        repeated = sequence is None or not commit
        shape = CallShape(len(members), len(ids[0]), rows, sequence or 0, repeated, commit, self._transaction.current)
        if self.head is not None:
            self.head.reserve(shape.T)
        if shape not in self._calls:
            self._bind(shape)
        logits = self._call(shape, ids[0] if len(ids) == 1 else [token for row in ids for token in row])
        if self.observer is not None:
            self.observer(len(self._tokens[shape.first]), shape.T, self._calls[shape].results)
        for row, i in enumerate(members):
            self._tokens[i].extend(ids[row])
            self._open[i] = 0
            if commit:
                self._transaction.committed(i)
            else:
                self._transaction.verified(i, shape.T)
        if self.head is not None and self._hidden is not None:
            self.head.append(self._hidden, shape.T)
        return logits

    def _call(self, shape: CallShape, ids: Sequence[int]) -> Rows:
        members = range(shape.first, shape.first + shape.b)
        return self._calls[shape].run(
            ids,
            [len(self._tokens[i]) for i in members],
            accepted=[self._transaction.accepted[i] for i in members],
            commit=[shape.T if shape.commit else 0] * shape.b,
        )

    def _bind(self, shape: CallShape) -> None:
        """Make the bindings for calls of one shape. Steps, drafts and whole chunks come back; odd sizes of prompts' ends are dropped."""
        started, busy = time.perf_counter(), self.session.busy_s
        for old in [s for s in self._calls if not s.repeated and self.chunk != s.T]:
            del self._calls[old]
        # Recording runs the graph several times over: that is done now, and the states are put back.
        recorded = self._records(shape)
        marks = [self._mark(i, np.zeros(0, np.uint8)) for i in range(self.batch)] if recorded else []
        current = self._transaction.current
        try:
            self._transaction.current = shape.pending
            self._calls[shape] = self._bound(shape)
            if recorded:
                self._call(shape, [0] * (shape.b * shape.T))
        finally:
            self._transaction.current = current
            for i, mark in enumerate(marks):
                self._load(mark, i)
        self.session.busy_s = busy  # counted once, as time spent on bindings
        self._binding_s += time.perf_counter() - started

    def _records(self, shape: CallShape) -> bool:
        return self.session.device == "cuda" and shape.repeated

    def _bound(self, shape: CallShape) -> BoundCall:
        states = {name: buffer.row_address(shape.first) for name, buffer in self.states.items()}
        inputs = states | {name: table.address for name, table in self.tables.items()} | self._transaction.inputs(shape.first)
        outputs = {state.after: states[state.name] for state in self.session.spec.states if not state.pending}
        outputs |= self._transaction.outputs(shape.first, commit=shape.commit)
        if self._hidden is not None:
            outputs["hidden"] = self._hidden.address
        dims = {"B": shape.b, "T": shape.T, "N": shape.b * shape.rows, "S": self.slots, "P": self._transaction.width}
        return BoundCall(self.session, dims, inputs, outputs, self._logits, repeated=shape.repeated)


def _chunk(device: str, manifest: Manifest) -> int:
    """Tokens per prefill call."""
    if device == "cpu" and manifest.model.get("num_experts"):
        return _MOE_CHUNK
    if device == "cpu" and manifest.target.precision in ("int8", "int4"):
        return _QUANTIZED_CHUNK
    return PREFILL_CHUNK[device]
