"""The decoder as a machine with state: tokens in, logits out.

All memory that lives from call to call (states, caches, rotary tables, controls) is allocated once and bound by address. Graphs write
states and caches in place, so a step copies nothing and costs the same whatever the capacity.

A batch has B sequences of their own lengths. Prompts are read one sequence at a time, through bindings that see that sequence's part of
every buffer: no padding, and a prompt's tokens touch no other sequence. Steps advance all sequences together, one token each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export.errors import ContextOverflow, QwenExportError
from qwen_export.manifest import Manifest, TensorSpec
from qwen_export.runtimes.buffers import BUFFERS, Buffer, Bytes, HostBuffer, decode, encode
from qwen_export.runtimes.onnxruntime_session import Call, Session

Logits = npt.NDArray[np.float32]

# Tokens per prefill call: enough to keep matrix products busy, few enough to bound activations and attention scores.
PREFILL_CHUNK = {"cpu": 512, "cuda": 2048}
# Attention scores of one call, Hq x T x S fp32 values on the host, stay below this.
_SCORE_BYTES = 512 << 20


@dataclass(frozen=True)
class Mark:
    """A point to go back to within one decoder: recurrent states and conv histories after `tokens`. The caches stay where they are, so it
    is small, and valid as long as the sequence still begins with `tokens`."""

    tokens: tuple[int, ...]
    states: dict[str, Bytes]


@dataclass(frozen=True)
class Snapshot:
    """Everything one sequence has read: self-contained, valid for any decoder of the same bundle and precision."""

    mark: Mark
    caches: dict[str, Bytes]


class Decoder:
    """`batch` sequences over one loaded graph, each with room for `capacity` tokens."""

    def __init__(self, session: Session, manifest: Manifest, batch: int = 1, capacity: int | None = None) -> None:
        self.session, self.manifest, self.batch = session, manifest, batch
        self.capacity = capacity or manifest.max_context
        limit = manifest.model["max_position_embeddings"]
        if not 0 < self.capacity <= limit:
            raise QwenExportError("the context is larger than the model's", got=self.capacity, expected=f"at most {limit}", fix="Lower --max-context.")
        self._tokens: list[list[int]] = [[] for _ in range(batch)]
        kind = BUFFERS[session.device]
        self._specs = {tensor.name: tensor for tensor in (*session.spec.inputs, *session.spec.outputs)}
        self._states = {state.name: kind(state.dtype, self._shape(state.shape)) for state in session.spec.states}
        self._tables = {name: self._table(kind, name) for name in ("cos", "sin")}
        self._calls: dict[tuple[int, int | None, int], _BoundCall] = {}
        heads = manifest.model["num_attention_heads"]
        room = _SCORE_BYTES // (4 * heads * self.capacity) if session.device == "cpu" else PREFILL_CHUNK["cuda"]
        self.chunk = max(16, min(PREFILL_CHUNK[session.device], room))

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence has read."""
        return [len(tokens) for tokens in self._tokens]

    def tokens(self, sequence: int = 0) -> tuple[int, ...]:
        return tuple(self._tokens[sequence])

    def prefill(self, ids: Sequence[int], sequence: int = 0, chunk: int | None = None, *, want_logits: bool = True) -> Logits:
        """Read more tokens into one sequence, in calls of at most `chunk`; returns the last token's logits f32[V], empty when not wanted."""
        if not len(ids):
            raise QwenExportError("there is nothing to read", got="no tokens", expected="at least one")
        self._check_room(sequence, len(ids))
        size = chunk or self.chunk
        for start in range(0, len(ids) - size, size):
            self._run(np.asarray([ids[start : start + size]], np.int64), sequence, 0)
        last = len(ids) - 1 - (len(ids) - 1) % size
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
        return Mark(self.tokens(sequence), {name: _row(self._states[name], sequence).copy() for name in fixed})

    def rewind(self, mark: Mark, sequence: int = 0) -> None:
        """Make the sequence what it was at the mark, bit for bit; cache rows behind it are never read again."""
        length = len(mark.tokens)
        if tuple(self._tokens[sequence][:length]) != mark.tokens:
            raise QwenExportError("the mark belongs to other text than the sequence begins with", fix="Restore a snapshot instead.")
        for spec in self.session.spec.states:
            if not spec.grows:
                buffer = self._states[spec.name]
                _set_row(buffer, sequence, mark.states.get(spec.name, np.zeros(buffer.row_bytes(), np.uint8)))
        del self._tokens[sequence][length:]

    def snapshot(self, sequence: int = 0) -> Snapshot:
        """Copy what the sequence has read: a mark and the used part of the caches."""
        used = len(self._tokens[sequence])
        caches = {
            spec.name: np.ascontiguousarray(self._cache_view(_row(self._states[spec.name], sequence), spec.shape)[:, :used])
            for spec in self.session.spec.states
            if spec.grows
        }
        return Snapshot(self.mark(sequence), caches)

    def restore(self, snapshot: Snapshot, sequence: int = 0) -> None:
        """Make the sequence what it was at the snapshot, bit for bit, whatever it has read since."""
        length = len(snapshot.mark.tokens)
        if length > self.capacity:
            raise ContextOverflow("the snapshot is longer than this decoder's context", got=length, expected=f"at most {self.capacity} tokens")
        for spec in self.session.spec.states:
            if spec.grows:
                row = _row(self._states[spec.name], sequence)
                self._cache_view(row, spec.shape)[:, :length] = snapshot.caches[spec.name]
                _set_row(self._states[spec.name], sequence, row)
        self._tokens[sequence] = list(snapshot.mark.tokens)
        self.rewind(snapshot.mark, sequence)

    def _cache_view(self, row: Bytes, shape: tuple[int | str, ...]) -> Bytes:
        """One sequence's cache [Hkv,S,D] as bytes [Hkv,S,row]."""
        return row.reshape(int(shape[1]), self.capacity, -1)

    def _check_room(self, sequence: int, count: int) -> None:
        used = len(self._tokens[sequence])
        if used + count > self.capacity:
            raise ContextOverflow(
                "the context is full",
                got=f"{used} tokens read and {count} more",
                expected=f"at most {self.capacity}",
                fix=f"Shorten the input, or load with a larger max_context (the model's limit is {self.manifest.model['max_position_embeddings']}).",
            )

    def _run(self, ids: npt.NDArray[np.int64], sequence: int | None, rows: int) -> Logits:
        """One call over `ids` [b,T]: all sequences, or one; logits of the last `rows` tokens."""
        b, T = ids.shape
        key = (T, sequence, rows)
        if key not in self._calls:
            # Decode and whole chunks come back; the odd sizes of prompts' ends do not.
            for old in [k for k in self._calls if k[0] not in (1, self.chunk)]:
                del self._calls[old]
            self._calls[key] = _BoundCall(self, b, T, sequence, rows)
        members = range(self.batch) if sequence is None else [sequence]
        lengths = np.array([len(self._tokens[i]) for i in members], np.int32)
        logits = self._calls[key].run(ids, lengths)
        for row, i in enumerate(members):
            self._tokens[i].extend(ids[row].tolist())
        return logits

    def _shape(self, shape: tuple[int | str, ...], **dims: int) -> tuple[int, ...]:
        known = {"B": self.batch, "S": self.capacity} | dims
        return tuple(d if isinstance(d, int) else known[d] for d in shape)

    def _table(self, kind: type[Buffer], name: str) -> Buffer:
        spec, rotary = self._specs[name], self.manifest.rotary
        buffer = kind(spec.dtype, self._shape(spec.shape))
        # fp32 products, as the reference computes them; then cos and sin of exactly those angles.
        angles = np.arange(self.capacity, dtype=np.float32)[:, None] * np.asarray(rotary.inv_freq, np.float32)
        values = (np.cos(angles) if name == "cos" else np.sin(angles)) * np.float32(rotary.scaling)
        buffer.write(encode(values, spec.dtype))
        return buffer


class _BoundCall:
    """Bindings for calls of one shape."""

    def __init__(self, decoder: Decoder, b: int, T: int, sequence: int | None, rows: int) -> None:
        session, kind = decoder.session, BUFFERS[decoder.session.device]
        self._call: Call = session.call(repeated=repeated)
        self._controls: dict[str, Buffer] = {}
        row = sequence or 0
        repeated = T == 1 and sequence is None
        dims = {"B": b, "T": T, "N": rows}

        def shape(spec: TensorSpec) -> tuple[int, ...]:
            return decoder._shape(spec.shape, **dims)

        outputs = {state.after: decoder._states[state.name] for state in session.spec.states}
        for spec in session.spec.inputs:
            if spec.name in decoder._states:
                self._call.input(spec.name, shape(spec), decoder._states[spec.name].row_address(row))
            elif spec.name in decoder._tables:
                self._call.input(spec.name, shape(spec), decoder._tables[spec.name].address)
            else:
                control = (HostBuffer if spec.name == "total_length" else kind)(spec.dtype, shape(spec))
                self._controls[spec.name] = control
                self._call.input(spec.name, shape(spec), control.address)
        for spec in session.spec.outputs:
            if spec.name in outputs:
                self._call.output(spec.name, shape(spec), outputs[spec.name].row_address(row))
            else:
                self._logits = kind(spec.dtype, shape(spec))
                self._call.output(spec.name, shape(spec), self._logits.address)
        self._T, self._capacity = T, decoder.capacity
        self._recorded = session.device == "cuda" and repeated
        self._controls["logit_rows"].write(_bytes(np.arange(T - rows, T, dtype=np.int64)))

    def run(self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32]) -> Logits:
        self._controls["input_ids"].write(_bytes(ids))
        self._controls["last_slot"].write(_bytes(lengths + np.int32(self._T - 1)))
        # A recorded step keeps the value it was recorded with: the capacity is right for all of them.
        total = self._capacity if self._recorded else lengths.max() + self._T
        self._controls["total_length"].write(_bytes(np.array(total, np.int32)))
        self._call.run()
        logits = self._logits
        if isinstance(logits, HostBuffer) and logits.dtype == "float":
            return logits.array
        return decode(logits.read(), logits.dtype, logits.shape)


def _bytes(array: npt.NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _row(buffer: Buffer, index: int) -> Bytes:
    """One sequence's bytes; on the host a view."""
    size = buffer.row_bytes()
    data = buffer.bytes if isinstance(buffer, HostBuffer) else buffer.read()
    return data[index * size : (index + 1) * size]


def _set_row(buffer: Buffer, index: int, data: Bytes) -> None:
    size = buffer.row_bytes()
    if isinstance(buffer, HostBuffer):
        buffer.bytes[index * size : (index + 1) * size] = data
    else:
        everything = buffer.read()
        everything[index * size : (index + 1) * size] = data
        buffer.write(everything)
