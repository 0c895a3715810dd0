"""The decoder as a machine with state: tokens in, logits out.

All memory that lives from call to call (states, caches, rotary tables, controls) is allocated once and bound by address. Graphs write
states and caches in place, so a step copies nothing and costs the same whatever the capacity.

A bundle with a draft head has one more way to read: `verify` reads tokens without committing them, and `accept` says how many stay.

A batch has B sequences of their own lengths. Prompts are read one sequence at a time, through bindings that see that sequence's part of
every buffer: no padding, and a prompt's tokens touch no other sequence. Steps advance all sequences together, one token each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qwen_export.errors import ContextOverflow, QwenExportError
from qwen_export.manifest import Manifest
from qwen_export.runtimes.bound_call import BoundCall
from qwen_export.runtimes.buffers import BUFFERS, Buffer, Bytes, CudaBuffer, HostBuffer, encode
from qwen_export.runtimes.draft_head import DraftHead
from qwen_export.runtimes.onnxruntime_session import Session
from qwen_export.runtimes.transaction import Transaction

Logits = npt.NDArray[np.float32]

# Tokens per prefill call: enough to keep matrix products busy, few enough to bound the activations.
PREFILL_CHUNK = {"cpu": 256, "cuda": 2048}
# Quantised products are at full speed from fewer on; calls of a mixture of experts are split over the experts, and want more.
_QUANTISED_CHUNK, _MOE_CHUNK = 128, 512
# CUDA attention costs by the slots allocated, not by the tokens in them: caches start small there and double.
_FIRST_SLOTS = 2048
_SLOT_AXIS = 2
_TABLE_ROWS = 1024
_LONG_TEXT = 8192


@dataclass(frozen=True)
class Mark:
    """A point to go back to within one decoder: recurrent states and conv histories after `tokens`. The caches stay where they are, so it
    is small, and valid as long as the sequence still begins with `tokens`. `accepted` tokens of `pending` are not in the states yet;
    `waiting` is the hidden state that the draft head has not read."""

    tokens: tuple[int, ...]
    states: dict[str, Bytes]
    accepted: int = 0
    pending: dict[str, Bytes] = field(default_factory=dict)
    waiting: Bytes = field(default_factory=lambda: np.zeros(0, np.uint8))


@dataclass(frozen=True)
class Snapshot:
    """Everything one sequence has read: self-contained, valid for any decoder of the same bundle."""

    mark: Mark
    caches: dict[str, Bytes]


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


class Decoder:
    """`batch` sequences over one loaded graph, each with room for `capacity` tokens. `head_session` is the draft head's graph, for a
    single sequence."""

    def __init__(
        self, session: Session, manifest: Manifest, batch: int = 1, capacity: int | None = None, head_session: Session | None = None
    ) -> None:
        self.session, self.manifest, self.batch = session, manifest, batch
        self.capacity = capacity or manifest.max_context
        limit = manifest.model["max_position_embeddings"]
        if not 0 < self.capacity <= limit:
            raise QwenExportError(
                "the context is larger than the model's", got=self.capacity, expected=f"at most {limit}", fix="Lower --max-context."
            )
        if batch < 1:
            raise QwenExportError("a decoder needs at least one sequence", got=batch)
        self.chunk = _chunk(session.device, manifest)
        self.slots = min(self.capacity, _FIRST_SLOTS) if session.device == "cuda" else self.capacity
        self.widest_verify = 1 + manifest.speculation.max_draft if manifest.speculation else 0
        """Tokens that one `verify` can read, 0 where the bundle cannot."""
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
        self._tokens: list[list[int]] = [[] for _ in range(batch)]
        self._calls: dict[CallShape, BoundCall] = {}
        self._transaction = Transaction(session.spec, kind, batch, max(1, self.widest_verify), self.chunk)
        hidden = next((tensor for tensor in session.spec.outputs if tensor.name == "hidden"), None)
        self._hidden = kind(hidden.dtype, (max(self.chunk, batch), int(hidden.shape[-1]))) if hidden else None
        self._open = 0
        self._binding_s = 0.0
        self.head = DraftHead(head_session, self) if head_session is not None and batch == 1 else None

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence has read."""
        return [len(tokens) for tokens in self._tokens]

    def tokens(self, sequence: int = 0) -> tuple[int, ...]:
        return tuple(self._tokens[sequence])

    def tokens_from(self, position: int) -> list[int]:
        """What the first sequence has read from a position on."""
        return self._tokens[0][position:]

    def prefill(self, ids: Sequence[int], sequence: int = 0, chunk: int | None = None, *, want_logits: bool = True) -> Logits:
        """Read more tokens into one sequence, in calls of at most `chunk`; returns the last token's logits f32[V], empty when not wanted.
        Logits are valid until the next call."""
        if not len(ids):
            raise QwenExportError("there is nothing to read", got="no tokens", expected="at least one")
        self._check_room(sequence, len(ids))
        size = min(chunk or self.chunk, self.chunk)
        last = len(ids) - 1 - (len(ids) - 1) % size
        for start in range(0, last, size):
            self._run(np.asarray([ids[start : start + size]], np.int64), sequence, 0)
        return self._run(np.asarray([ids[last:]], np.int64), sequence, int(want_logits)).reshape(-1)

    def read(self, ids: Sequence[int], sequence: int = 0) -> Logits:
        """Read at most `chunk` tokens in one call; returns the logits of all of them, f32[T,V]."""
        self._check_room(sequence, len(ids))
        return self._run(np.asarray([ids], np.int64), sequence, len(ids))[0]

    def step(self, tokens: Sequence[int]) -> Logits:
        """Advance every sequence by one token; returns logits f32[B,V], valid until the next call."""
        for sequence in range(self.batch):
            self._check_room(sequence, 1)
        return self._run(np.asarray(tokens, np.int64)[:, None], None, 1)[:, 0]

    def verify(self, tokens: Sequence[int], sequence: int = 0) -> Logits:
        """Read at most `widest_verify` tokens whose fate is open; returns the logits of all of them, f32[T,V], valid until the next call.
        `accept` must follow."""
        if not 0 < len(tokens) <= self.widest_verify:
            raise QwenExportError(
                "a draft has the wrong length" if self.widest_verify else "the bundle was built without speculation",
                got=len(tokens),
                expected=f"1 to {self.widest_verify} tokens" if self.widest_verify else "",
                fix="" if self.widest_verify else "Build it again without --no-mtp, or with --lookup.",
            )
        self._check_room(sequence, len(tokens))
        logits = self._run(np.asarray([tokens], np.int64), sequence, len(tokens), commit=False)[0]
        self._open = len(tokens)
        return logits

    def accept(self, count: int, sequence: int = 0) -> None:
        """Keep the first `count` tokens of the verify before. May be called again with a smaller number until the next call reads."""
        if not 0 <= count <= self._open:
            raise QwenExportError("more tokens are accepted than were verified", got=count, expected=f"at most {self._open}")
        del self._tokens[sequence][len(self._tokens[sequence]) - self._open + count :]
        self._open = self._transaction.accepted[sequence] = count
        if self.head is not None:
            self.head.cut()

    def prepare(self, count: int) -> None:
        """Make what a step (1) or a verify of `count` tokens needs, so that the first one takes no longer than the others; before a verify
        the draft head reads what plain steps have left it."""
        if count > 1 and self.head is not None and self.head.behind > self.widest_verify:
            self.head.catch_up()
        shape = CallShape(1, count, count, 0, True, count == 1, self._transaction.current)
        if self.batch == 1 and shape not in self._calls and count <= max(1, self.widest_verify):
            self._make_room(min(self.capacity, self.lengths[0] + count))
            self._bind(shape, np.zeros((1, count), np.int64))

    @property
    def busy_s(self) -> float:
        """Seconds that the backend has worked for this decoder and its draft head, and others of the same session."""
        return self.session.busy_s + (self.head.session.busy_s if self.head is not None else 0.0)

    @property
    def binding_s(self) -> float:
        """Seconds spent on bindings, and on recording them, which happens once per kind of call."""
        return self._binding_s + (self.head.binding_s if self.head is not None else 0.0)

    def reset(self, sequence: int = 0) -> None:
        """Forget everything the sequence has read."""
        self.rewind(Mark((), {}), sequence)

    def mark(self, sequence: int = 0) -> Mark:
        """Remember this point of the sequence."""
        waiting = self.head.save() if self.head is not None else np.zeros(0, np.uint8)
        return self._mark(sequence, waiting)

    def _mark(self, sequence: int, waiting: Bytes) -> Mark:
        states = {name: self.states[name].read_row(sequence) for name in self._fixed_names()}
        accepted = self._transaction.accepted[sequence]
        return Mark(self.tokens(sequence), states, accepted, self._transaction.save(sequence), waiting)

    def rewind(self, mark: Mark, sequence: int = 0) -> None:
        """Make the sequence what it was at the mark, bit for bit; cache rows behind it are never read again."""
        length = len(mark.tokens)
        if tuple(self._tokens[sequence][:length]) != mark.tokens:
            raise QwenExportError("the mark belongs to other text than the sequence begins with", fix="Restore a snapshot instead.")
        self._load(mark, sequence)
        del self._tokens[sequence][length:]
        self._open = 0
        if self.head is not None:
            self.head.load(mark.waiting)

    def _load(self, mark: Mark, sequence: int) -> None:
        for name in self._fixed_names():
            buffer = self.states[name]
            buffer.write_row(sequence, mark.states.get(name, np.zeros(buffer.row_bytes, np.uint8)))
        self._transaction.load(sequence, mark.accepted, mark.pending)

    def snapshot(self, sequence: int = 0) -> Snapshot:
        """Copy what the sequence has read: a mark and the used part of the caches."""
        mark, used = self.mark(sequence), len(self._tokens[sequence])
        return Snapshot(
            mark, {name: np.ascontiguousarray(self._cache_rows(b, b.read_row(sequence))[:, :used]) for name, b in self._caches().items()}
        )

    def restore(self, snapshot: Snapshot, sequence: int = 0) -> None:
        """Make the sequence what it was at the snapshot, bit for bit, whatever it has read since."""
        length = len(snapshot.mark.tokens)
        if length > self.capacity:
            raise ContextOverflow(
                "the snapshot is longer than this decoder's context", got=length, expected=f"at most {self.capacity} tokens"
            )
        self._make_room(length)
        for name, buffer in self._caches().items():
            if name not in snapshot.caches:
                raise QwenExportError(
                    "the snapshot was taken without the draft head",
                    fix="Take it from a decoder that drafts, or restore it into one that does not.",
                )
            row = buffer.read_row(sequence)
            self._cache_rows(buffer, row)[:, :length] = snapshot.caches[name]
            buffer.write_row(sequence, row)
        self._tokens[sequence] = list(snapshot.mark.tokens)
        self.rewind(snapshot.mark, sequence)

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

    def _check_room(self, sequence: int, count: int) -> None:
        used = len(self._tokens[sequence])
        if used + count > self.capacity:
            raise ContextOverflow(
                "the context is full",
                got=f"{used} tokens read and {count} more",
                expected=f"at most {self.capacity}",
                fix=f"Shorten the input, or load with a larger max_context, at most {self.manifest.model['max_position_embeddings']}.",
            )
        self._make_room(used + count)

    def _fill_tables(self, length: int) -> None:
        """Make the rows of the rotary tables for the first `length` slots, and some that drafts and the next calls will want."""
        if length <= self._table_rows:
            return
        rows = min(self.capacity, length + _TABLE_ROWS)
        rotary = self.manifest.rotary
        for start in range(self._table_rows, rows, _TABLE_ROWS):
            stop = min(rows, start + _TABLE_ROWS)
            # fp32 products, as the reference computes them; then cos and sin of exactly those angles.
            angles = np.arange(start, stop, dtype=np.float32)[:, None] * np.asarray(rotary.inv_freq, np.float32)
            for name, table in self.tables.items():
                values = (np.cos(angles) if name == "cos" else np.sin(angles)) * np.float32(rotary.scaling)
                table.write(encode(values, table.dtype), start * table.row_bytes)
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

    def _run(self, ids: npt.NDArray[np.int64], sequence: int | None, rows: int, *, commit: bool = True) -> Logits:
        """One call over `ids` [b,T]: all sequences, or one; logits f32[b,rows,V] of the last `rows` tokens."""
        members = range(self.batch) if sequence is None else [sequence]
        repeated = sequence is None or not commit
        shape = CallShape(len(members), ids.shape[1], rows, sequence or 0, repeated, commit, self._transaction.current)
        if self.head is not None:
            self.head.reserve(shape.T)
        if shape not in self._calls:
            self._bind(shape, ids)
        logits = self._call(shape, ids)
        self._open = 0
        for row, i in enumerate(members):
            self._tokens[i].extend(ids[row].tolist())
            if commit:
                self._transaction.committed(i)
            else:
                self._transaction.verified(i, shape.T)
        if self.head is not None and self._hidden is not None:
            self.head.append(self._hidden, shape.T)
        return logits

    def _call(self, shape: CallShape, ids: npt.NDArray[np.int64]) -> Logits:
        members = range(shape.first, shape.first + shape.b)
        return self._calls[shape].run(
            ids,
            np.array([len(self._tokens[i]) for i in members], np.int32),
            accepted=np.array([self._transaction.accepted[i] for i in members], np.int64),
            commit=np.full(shape.b, shape.T if shape.commit else 0, np.int64),
        )

    def _bind(self, shape: CallShape, ids: npt.NDArray[np.int64]) -> None:
        """Make the bindings for calls of one shape. Steps, drafts and whole chunks come back; odd sizes of prompts' ends are dropped."""
        started = time.perf_counter()
        for old in [s for s in self._calls if not s.repeated and self.chunk != s.T]:
            del self._calls[old]
        states = {name: buffer.row_address(shape.first) for name, buffer in self.states.items()}
        inputs = states | {name: table.address for name, table in self.tables.items()} | self._transaction.inputs(shape.first)
        outputs = {state.after: states[state.name] for state in self.session.spec.states if not state.pending}
        outputs |= self._transaction.outputs(shape.first, commit=shape.commit)
        if self._hidden is not None:
            outputs["hidden"] = self._hidden.address
        dims = {"B": shape.b, "T": shape.T, "N": shape.rows, "S": self.slots, "P": self._transaction.width}
        call = self._calls[shape] = BoundCall(self.session, dims, inputs, outputs, repeated=shape.repeated)
        if call.recorded:
            # Recording runs the graph several times over: do that now, and put the states back.
            marks = [self._mark(i, np.zeros(0, np.uint8)) for i in range(self.batch)]
            self._call(shape, ids)
            for i, mark in enumerate(marks):
                self._load(mark, i)
        self._binding_s += time.perf_counter() - started


def _chunk(device: str, manifest: Manifest) -> int:
    """Tokens per prefill call."""
    if device == "cpu" and manifest.model.get("num_experts"):
        return _MOE_CHUNK
    if device == "cpu" and manifest.target.precision in ("int8", "int4"):
        return _QUANTISED_CHUNK
    return PREFILL_CHUNK[device]
