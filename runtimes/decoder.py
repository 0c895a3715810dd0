"""The decoder as a machine with state: tokens in, logits out.

All memory that lives from call to call (states, caches, rotary tables, controls) is allocated once and bound by address. Graphs write
states and caches in place, so a step copies nothing and costs the same whatever the capacity.

A batch has B sequences of their own lengths. Prompts are read one sequence at a time, through bindings that see that sequence's part of
every buffer: no padding, and a prompt's tokens touch no other sequence. Steps advance all sequences together, one token each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen_export.errors import ContextOverflow, QwenExportError
from qwen_export.manifest import Manifest
from qwen_export.runtimes.bound_call import BoundCall, CallShape
from qwen_export.runtimes.buffers import BUFFERS, Buffer, Bytes, CudaBuffer, encode
from qwen_export.runtimes.onnxruntime_session import Session

Logits = npt.NDArray[np.float32]

# Tokens per prefill call: enough to keep matrix products busy, few enough to bound the activations.
PREFILL_CHUNK = {"cpu": 512, "cuda": 2048}
# CUDA attention costs by the slots allocated, not by the tokens in them: caches start small there and double.
_FIRST_SLOTS = 2048
_SLOT_AXIS = 2


@dataclass(frozen=True)
class Mark:
    """A point to go back to within one decoder: recurrent states and conv histories after `tokens`. The caches stay where they are, so it
    is small, and valid as long as the sequence still begins with `tokens`."""

    tokens: tuple[int, ...]
    states: dict[str, Bytes]


@dataclass(frozen=True)
class Snapshot:
    """Everything one sequence has read: self-contained, valid for any decoder of the same bundle."""

    mark: Mark
    caches: dict[str, Bytes]


class Decoder:
    """`batch` sequences over one loaded graph, each with room for `capacity` tokens."""

    def __init__(self, session: Session, manifest: Manifest, batch: int = 1, capacity: int | None = None) -> None:
        self.session, self.manifest, self.batch = session, manifest, batch
        self.capacity = capacity or manifest.max_context
        limit = manifest.model["max_position_embeddings"]
        if not 0 < self.capacity <= limit:
            raise QwenExportError(
                "the context is larger than the model's", got=self.capacity, expected=f"at most {limit}", fix="Lower --max-context."
            )
        if batch < 1:
            raise QwenExportError("a decoder needs at least one sequence", got=batch)
        self.chunk = PREFILL_CHUNK[session.device]
        self.slots = min(self.capacity, _FIRST_SLOTS) if session.device == "cuda" else self.capacity
        kind = BUFFERS[session.device]
        dims = {"B": batch, "S": self.slots}
        self.states: dict[str, Buffer] = {
            spec.name: kind(spec.dtype, tuple(d if isinstance(d, int) else dims[d] for d in spec.shape)) for spec in session.spec.states
        }
        self.tables = {spec.name: self._table(kind, spec.name, spec.dtype) for spec in session.spec.inputs if spec.name in ("cos", "sin")}
        self._tokens: list[list[int]] = [[] for _ in range(batch)]
        self._calls: dict[CallShape, BoundCall] = {}

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence has read."""
        return [len(tokens) for tokens in self._tokens]

    def tokens(self, sequence: int = 0) -> tuple[int, ...]:
        return tuple(self._tokens[sequence])

    def prefill(self, ids: Sequence[int], sequence: int = 0, chunk: int | None = None, *, want_logits: bool = True) -> Logits:
        """Read more tokens into one sequence, in calls of at most `chunk`; returns the last token's logits f32[V], empty when not wanted.
        Logits are valid until the next call."""
        if not len(ids):
            raise QwenExportError("there is nothing to read", got="no tokens", expected="at least one")
        self._check_room(sequence, len(ids))
        size = chunk or self.chunk
        last = len(ids) - 1 - (len(ids) - 1) % size
        for start in range(0, last, size):
            self._run(np.asarray([ids[start : start + size]], np.int64), sequence, 0)
        return self._run(np.asarray([ids[last:]], np.int64), sequence, int(want_logits)).reshape(-1)

    def read(self, ids: Sequence[int], sequence: int = 0) -> Logits:
        """Read tokens in one call; returns the logits of all of them, f32[T,V]."""
        self._check_room(sequence, len(ids))
        return self._run(np.asarray([ids], np.int64), sequence, len(ids))[0]

    def step(self, tokens: Sequence[int]) -> Logits:
        """Advance every sequence by one token; returns logits f32[B,V], valid until the next call."""
        for sequence in range(self.batch):
            self._check_room(sequence, 1)
        return self._run(np.asarray(tokens, np.int64)[:, None], None, 1)[:, 0]

    def reset(self, sequence: int = 0) -> None:
        """Forget everything the sequence has read."""
        self.rewind(Mark((), {}), sequence)

    def mark(self, sequence: int = 0) -> Mark:
        """Remember this point of the sequence."""
        fixed = [spec.name for spec in self.session.spec.states if not spec.grows]
        return Mark(self.tokens(sequence), {name: self.states[name].read_row(sequence) for name in fixed})

    def rewind(self, mark: Mark, sequence: int = 0) -> None:
        """Make the sequence what it was at the mark, bit for bit; cache rows behind it are never read again."""
        length = len(mark.tokens)
        if tuple(self._tokens[sequence][:length]) != mark.tokens:
            raise QwenExportError("the mark belongs to other text than the sequence begins with", fix="Restore a snapshot instead.")
        for spec in self.session.spec.states:
            if not spec.grows:
                buffer = self.states[spec.name]
                buffer.write_row(sequence, mark.states.get(spec.name, np.zeros(buffer.row_bytes, np.uint8)))
        del self._tokens[sequence][length:]

    def snapshot(self, sequence: int = 0) -> Snapshot:
        """Copy what the sequence has read: a mark and the used part of the caches."""
        used = len(self._tokens[sequence])
        caches = {
            name: np.ascontiguousarray(self._cache_rows(self.states[name].read_row(sequence), name)[:, :used])
            for name in self._cache_names()
        }
        return Snapshot(self.mark(sequence), caches)

    def restore(self, snapshot: Snapshot, sequence: int = 0) -> None:
        """Make the sequence what it was at the snapshot, bit for bit, whatever it has read since."""
        length = len(snapshot.mark.tokens)
        if length > self.capacity:
            raise ContextOverflow(
                "the snapshot is longer than this decoder's context", got=length, expected=f"at most {self.capacity} tokens"
            )
        self._make_room(length)
        for name in self._cache_names():
            row = self.states[name].read_row(sequence)
            self._cache_rows(row, name)[:, :length] = snapshot.caches[name]
            self.states[name].write_row(sequence, row)
        self._tokens[sequence] = list(snapshot.mark.tokens)
        self.rewind(snapshot.mark, sequence)

    def _cache_names(self) -> list[str]:
        return [spec.name for spec in self.session.spec.states if spec.grows]

    def _cache_rows(self, row: Bytes, name: str) -> Bytes:
        """One sequence's cache [Hkv,S,D] as bytes [Hkv,S,D * element size]."""
        return row.reshape(self.states[name].shape[1], self.slots, -1)

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

    def _make_room(self, length: int) -> None:
        """Double the allocated slots until `length` fits. Happens on CUDA only, and a few times in a long conversation."""
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
        self._calls.clear()

    def _run(self, ids: npt.NDArray[np.int64], sequence: int | None, rows: int) -> Logits:
        """One call over `ids` [b,T]: all sequences, or one; logits f32[b,rows,V] of the last `rows` tokens."""
        members = range(self.batch) if sequence is None else [sequence]
        shape = CallShape(len(members), ids.shape[1], rows, sequence or 0, repeated=sequence is None)
        if shape not in self._calls:
            self._bind(shape, ids)
        lengths = np.array([len(self._tokens[i]) for i in members], np.int32)
        logits = self._calls[shape].run(ids, lengths)
        for row, i in enumerate(members):
            self._tokens[i].extend(ids[row].tolist())
        return logits

    def _bind(self, shape: CallShape, ids: npt.NDArray[np.int64]) -> None:
        """Make the bindings for calls of one shape. Steps and whole chunks come back; the odd sizes of prompts' ends are dropped."""
        for old in [s for s in self._calls if not s.repeated and self.chunk != s.T]:
            del self._calls[old]
        call = self._calls[shape] = BoundCall(self.session, shape, self.states, self.tables, self.slots)
        if call.recorded:
            # Recording runs the graph several times over: do that now, and put the states back.
            marks = [self.mark(i) for i in range(self.batch)]
            call.run(ids, np.array(self.lengths, np.int32))
            for i, mark in enumerate(marks):
                self.rewind(mark, i)

    def _table(self, kind: type[Buffer], name: str, dtype: str) -> Buffer:
        rotary = self.manifest.rotary
        # fp32 products, as the reference computes them; then cos and sin of exactly those angles.
        angles = np.arange(self.capacity, dtype=np.float32)[:, None] * np.asarray(rotary.inv_freq, np.float32)
        values = (np.cos(angles) if name == "cos" else np.sin(angles)) * np.float32(rotary.scaling)
        buffer = kind(dtype, values.shape)
        buffer.write(encode(values, dtype))
        return buffer
