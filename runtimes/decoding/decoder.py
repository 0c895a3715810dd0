"""A decoder: slots that hold sequences, tokens in and logits out.

`run` is the one way to launch work: it takes a `Read` for each sequence that takes part, of any length, and returns their rows of logits.
`prefill`, `read`, `step` and `verify` are short forms of it. Two kinds of decoder exist, for graphs with dynamic shapes
(`dynamic_decoder.py`) and for sets of graphs with fixed ones (`static_decoder.py`); what callers may rely on in both is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qwen_export.errors import ContextOverflow, ParameterError, QwenExportError
from qwen_export.manifest import Manifest
from qwen_export.runtimes.decoding.logit_rows import JoinedRows, Row, Rows
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.decoding.sequence import Prompt, SequenceState
from qwen_export.runtimes.decoding.snapshot import CachePiece, Mark, Snapshot
from qwen_export.runtimes.memory.buffers import Buffer, Bytes
from qwen_export.runtimes.memory.copies import Kept

Logits = npt.NDArray[np.float32]

Observer = Callable[[int, int, Mapping[str, Buffer]], None]
"""Called after a call of the decoder's graph: with the tokens read before it, the tokens that it read, and by name the outputs that are no
states, valid until the next call. A call of fixed shape has more rows than tokens."""


class Follower(Protocol):
    """What keeps up with a decoder and drafts from there: a draft head (`draft_head.py`)."""

    follows: bool
    """Whether steps are kept up with; where `may_leave`, this may be False."""

    @property
    def may_leave(self) -> bool: ...
    @property
    def busy_s(self) -> float: ...
    @property
    def binding_s(self) -> float: ...
    def cut(self, slot: int) -> None:
        """The sequence has fewer tokens than before."""

    def save(self, slot: int) -> Bytes:
        """What `load` needs to go back to here."""

    def load(self, slot: int, waiting: Bytes) -> None:
        """The sequence went back to where `save` was called."""

    def behind(self, slot: int) -> int:
        """Rows that a draft would have to read."""

    def catch_up(self, slot: int) -> None:
        """Read them now, as far as their tokens are known."""

    def first(self, tokens: Mapping[int, int]) -> dict[int, Row]:
        """The draft after a token that follows the text read, by slot: logits of draft_vocab tokens, valid until the next call."""

    def following(self, tokens: Mapping[int, int], depth: int) -> dict[int, Row]:
        """The draft after a draft, which is the `depth`-th of its round (1 is the first), by slot."""


class Decoder(ABC):
    """`batch` slots, each with room for `capacity` tokens, at most `longest`."""

    chunk: int
    """Tokens that one committed read has at most."""
    logit_tokens: int = 1
    """Tokens of a committed read that leave a row of logits each: a row of the family has a megabyte."""
    widest_verify: int = 0
    """Tokens that one open read has at most, 0 where the bundle has none."""
    no_verify = ("the bundle was built without speculation", "Build it again with {mtp} or {lookup}.")
    """The message for that, and the way round."""
    limit = ("the model's", "Lower {max_context}.")
    """What sets the longest context, and what to do about a longer one."""
    head: Follower | None = None
    observer: Observer | None = None
    launches: bool = False
    """Whether `launch` returns while a device works."""
    sees: bool = False
    """Whether reads may have features of pictures."""
    shares_pasts: bool = False
    """Whether several tokens of several sequences, each behind its own past, share a call."""
    idle_rows: int = 0
    """Rows of a step that may be idle rather than that a step takes another call; 0 where sequences share no call."""

    def __init__(self, manifest: Manifest, batch: int, capacity: int | None, longest: int) -> None:
        self.manifest, self.batch, self.longest = manifest, batch, longest
        self.capacity = manifest.max_context if capacity is None else capacity
        if not 0 < self.capacity <= longest:
            raise ParameterError(
                f"the context is larger than {self.limit[0]}" if self.capacity > longest else "the context is empty",
                parameter="max_context",
                got=self.capacity,
                expected=f"1 to {longest}",
                fix=self.limit[1] if self.capacity > longest else "Raise {max_context}.",
            )
        if batch < 1:
            what = "a decoder needs at least one slot"
            raise ParameterError(what, parameter="batch", got=batch, expected="1 or more", fix="Raise {batch}.")
        self.sequences = [SequenceState() for _ in range(batch)]
        self._vocabulary = int(manifest.model["vocab_size"])
        self._slots = frozenset(range(batch))
        self._binding_s = 0.0

    # ---- what was read ----

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence has read."""
        return [len(sequence.tokens) for sequence in self.sequences]

    def tokens(self, slot: int = 0) -> tuple[int, ...]:
        return tuple(self.sequences[slot].tokens)

    # ---- reading ----

    def run(self, reads: Sequence[Read]) -> list[Rows]:
        """Read tokens into several sequences, at most one `Read` for each. Returns the rows of logits of each in the same order, row 0
        for the first token that has one; valid until the next run.

        The reads may differ in everything. They share a call of the graph where its kernels can; otherwise they take turns. Raises
        ParameterError or ContextOverflow before anything changes. A sequence whose call fails is no longer settled."""
        self._check(reads)
        return self._run(reads)

    def plan(self, reads: Sequence[Read]) -> list[list[int]]:
        """Indices of reads that `run` would bring into one call, call by call."""
        return [[index] for index in range(len(reads))]

    def advance(self, tokens: Sequence[int], first: int = 0) -> Rows:
        """One more token for each of neighboring slots, from `first` on: what `run` does with a read of one token for each, in less time
        on the host. Row i is that of slot `first + i`."""
        return self.launch(tokens, first)()

    def launch(self, tokens: Sequence[int], first: int = 0) -> Callable[[], Rows]:
        """The first half of `advance`: a GPU is at work on the call. The second half, which is returned, waits for the rows; before that
        these slots are not settled. Either may raise."""
        rows = self.run([Read(first + place, (token,)) for place, token in enumerate(tokens)])
        return lambda: rows[0] if len(rows) == 1 else JoinedRows(rows)

    def prefill(self, ids: Sequence[int], slot: int = 0, chunk: int | None = None, *, want_logits: bool = True) -> Logits:
        """Read more tokens into one sequence, in calls of at most `chunk`; returns the last token's logits f32[V], empty when not wanted.
        Logits are valid until the next call."""
        rows = Rows.none()
        parts = self.parts(len(ids), slot, chunk, want_logits=want_logits)
        for start, stop, logits in parts:
            [rows] = self.run([Read(slot, ids[start:stop], logits=logits)])
        return rows.array[0] if want_logits else np.empty(0, np.float32)

    def parts(self, count: int, slot: int = 0, chunk: int | None = None, *, want_logits: bool = True) -> list[tuple[int, int, int]]:
        """How to read a prompt of `count` tokens: start, stop and rows of logits of each read. Raises where it does not fit, before any
        read."""
        if not count:
            raise ParameterError("there is nothing to read", parameter="ids", got="no tokens", fix="Give at least one token.")
        if chunk is not None and chunk < 1:
            raise ParameterError("a call reads at least one token", parameter="chunk", got=chunk, fix="Raise {chunk}.")
        self.require_room(slot, count)
        size = min(chunk or self.chunk, self.chunk)
        starts = range(0, count, size)
        return [(start, min(count, start + size), int(want_logits and start == starts[-1])) for start in starts]

    @abstractmethod
    def read(self, ids: Sequence[int], slot: int = 0) -> Logits:
        """Read tokens; returns the logits of all of them, f32[T,V]. For measuring: T may be limited to `chunk`."""

    def step(self, tokens: Sequence[int]) -> Rows:
        """Advance every sequence by one token; row i has the logits of slot i, valid until the next call. They are copied where they are
        read as a whole; `argmax` and samplers need the largest only."""
        if len(tokens) != self.batch:
            what, fix = "a step takes one token per slot", "Use run() to advance some of the sequences."
            raise ParameterError(what, parameter="tokens", got=len(tokens), expected=self.batch, fix=fix)
        return self.advance(tokens)

    def verify(self, tokens: Sequence[int], slot: int = 0) -> Rows:
        """Read at most `widest_verify` tokens that may still be taken back; a row of logits for each, valid until the next call. `accept`
        must follow."""
        [rows] = self.run([Read(slot, tokens, commit=False, logits=len(tokens))])
        return rows.part(0, len(tokens))

    def accept(self, count: int, slot: int = 0) -> None:
        """Keep the first `count` tokens of the verify before. May be called again with a smaller number until the next read."""
        sequence = self._sequence(slot)
        sequence.require_settled(slot)
        if not 0 <= count <= sequence.open:
            raise ParameterError(
                "more tokens are accepted than were verified" if count >= 0 else "the number of accepted tokens is negative",
                parameter="count",
                got=count,
                expected=f"0 to {sequence.open}",
                fix="Accept tokens of the last verify only.",
            )
        sequence.cut(sequence.length - sequence.open + count)
        sequence.open = count
        self._accept(count, slot)
        if self.head is not None:
            self.head.cut(slot)

    def prepare(self, count: int) -> None:  # noqa: B027 - fixed shapes need nothing
        """Make what a step (1) or a verify of `count` tokens needs, so that the first one takes no longer than the others."""

    @abstractmethod
    def warm(self, drafts: int | None = None) -> None:
        """Do now what otherwise happens once, in the first answers: compiling, binding, recording. Changes nothing that was read.
        `drafts`: the most that will be verified, None for all that the draft head may make."""

    @property
    def records(self) -> bool:
        """Whether the first call of a kind takes many times as long as the others."""
        return False

    # ---- going back ----

    def reset(self, slot: int = 0) -> None:
        """Forget everything that the sequence has read."""
        self.rewind(Mark((), {}), slot)

    def mark(self, slot: int = 0, *, on_device: bool = False) -> Mark:
        """Remember this point of the sequence; with `on_device` in memory of the GPU, where there is one."""
        self._sequence(slot).require_settled(slot)
        return self._mark(slot, self.head.save(slot) if self.head is not None else np.zeros(0, np.uint8), on_device)

    def rewind(self, mark: Mark, slot: int = 0) -> None:
        """Make the sequence what it was at the mark, bit for bit; cache rows behind it are never read again. Settles the sequence."""
        sequence = self._sequence(slot)
        if not sequence.prompt().begins_with(mark.prompt):
            raise ParameterError(
                "the mark belongs to other text than the sequence begins with", parameter="mark", fix="Restore a snapshot instead."
            )
        sequence.settled = False
        self._load(mark, slot)
        sequence.go_back(len(mark.tokens))
        if self.head is not None:
            self.head.load(slot, mark.waiting)
        sequence.settled = True

    def snapshot(self, slot: int = 0, earlier: tuple[CachePiece, ...] = (), start: int = 0, *, on_device: bool = False) -> Snapshot:
        """Copy what the sequence has read: a mark and the used part of the caches. What `earlier` pieces hold of the same text is not
        copied again: the caches are those from token `start` on. With `on_device` the copies are in memory of the GPU, where there is
        one; such a snapshot fits decoders on the same GPU only."""
        mark = self.mark(slot, on_device=on_device)
        # The draft head's last row is not made before the next token is known: the piece before does not have it.
        start = max(0, min(start, len(mark.tokens)) - 1)
        return Snapshot(mark, self._save_caches(slot, start, on_device), start, earlier)

    def restore(self, snapshot: Snapshot, slot: int = 0) -> None:
        """Make the sequence what it was at the snapshot, bit for bit, whatever it has read since. Settles the sequence."""
        sequence, length = self._sequence(slot), len(snapshot.mark.tokens)
        if length > self.capacity:
            raise ContextOverflow(
                "the snapshot is longer than this decoder's context",
                got=length,
                expected=f"at most {self.capacity} tokens",
                fix="Load with a larger {max_context}.",
            )
        self._require_caches(snapshot, slot)
        self._make_room(min(self.capacity, length + self.widest_verify), slot)
        sequence.settled = False
        sequence.replace(Prompt(()))  # the caches are no longer those of the old text, whatever happens next
        for piece in snapshot.pieces:
            self._load_caches(piece, slot)
        sequence.replace(snapshot.mark.prompt)
        self.rewind(snapshot.mark, slot)

    def release(self, slot: int = 0) -> None:
        """Forget the text, and give back the memory of its cache rows where the device can."""
        self.reset(slot)

    # ---- what it cost ----

    @property
    @abstractmethod
    def busy_s(self) -> float:
        """Seconds from starts to ends of the backend's calls, for this decoder, its draft head, and others of the same sessions."""

    @property
    def binding_s(self) -> float:
        """Seconds spent on bindings, and on recording them, which happens once per kind of call."""
        return self._binding_s + (self.head.binding_s if self.head is not None else 0.0)

    @property
    @abstractmethod
    def fixed_bytes(self) -> int:
        """Bytes that all slots together hold, whatever they have read: states, and cache rows that are there from the start."""

    @abstractmethod
    def growing_bytes(self, length: int) -> int:
        """Bytes of cache rows that a sequence of `length` tokens takes beyond that."""

    @property
    def free_bytes(self) -> int | None:
        """Memory that caches could still take where they grow for each sequence alone, None where there is no such limit."""
        return None

    def held_bytes(self, slot: int) -> int:
        """Bytes of cache rows that a slot has now, beyond `fixed_bytes`."""
        return self.growing_bytes(self._sequence(slot).length)

    @property
    @abstractmethod
    def on_gpu(self) -> bool:
        """Whether states and caches are in other memory than the host's."""

    def sequence_bytes(self, length: int) -> int:
        """Bytes of states and caches of one slot with `length` tokens."""
        return self.fixed_bytes // self.batch + self.growing_bytes(length)

    # ---- for the kinds ----

    @abstractmethod
    def _run(self, reads: Sequence[Read]) -> list[Rows]: ...

    @abstractmethod
    def _accept(self, count: int, slot: int) -> None: ...

    @abstractmethod
    def _mark(self, slot: int, waiting: Bytes, on_device: bool) -> Mark: ...

    @abstractmethod
    def _load(self, mark: Mark, slot: int) -> None:
        """Take the states of a mark."""

    @abstractmethod
    def _save_caches(self, slot: int, start: int, on_device: bool) -> dict[str, Kept]: ...

    @abstractmethod
    def _load_caches(self, piece: CachePiece, slot: int) -> None: ...

    @abstractmethod
    def _cache_names(self) -> list[str]:
        """Names of the caches that a snapshot must have."""

    def _make_room(self, length: int, slot: int) -> None:  # noqa: B027 - most have their full size from the start
        """Allocate what a sequence of `length` tokens needs in a slot."""

    def _require_caches(self, snapshot: Snapshot, slot: int) -> None:
        missing = [name for name in self._cache_names() for piece in snapshot.pieces if name not in piece.rows]
        if missing:
            raise ParameterError(
                "the snapshot was taken without the draft head",
                parameter="snapshot",
                got=f"no {missing[0]}",
                fix="Take it from a decoder that drafts, or restore it into one that does not.",
            )

    # ---- checks ----

    def _sequence(self, slot: int) -> SequenceState:
        if slot not in self._slots:
            raise ParameterError(
                "the decoder has no such slot",
                parameter="slot",
                got=slot,
                expected=f"0 to {self.batch - 1}",
                fix="Make the decoder with a larger {batch}.",
            )
        return self.sequences[slot]

    def _check(self, reads: Sequence[Read]) -> None:
        if not reads:
            raise ParameterError("there is nothing to read", parameter="reads", got="no reads", fix="Give one per sequence that goes on.")
        for read in reads:
            read.check(self.batch, self._vocabulary)
            self.sequences[read.slot].require_settled(read.slot)
            if not read.commit and len(read.ids) > self.widest_verify:
                what, fix = ("a draft is too long", "Draft fewer tokens.") if self.widest_verify else self.no_verify
                got, expected = f"{len(read.ids)} tokens", f"at most {self.widest_verify} tokens"
                raise ParameterError(what, parameter="ids", got=got, expected=expected, fix=fix)
            if read.commit and len(read.ids) > self.chunk:
                raise ParameterError(
                    "one read has too many tokens",
                    parameter="ids",
                    got=len(read.ids),
                    expected=f"at most {self.chunk}",
                    fix="Read them with prefill(), or in several reads.",
                )
            if len(read.places) and not self.sees:
                raise QwenExportError("the graphs of this bundle read text only", got="pictures", fix="Build it again with {vision}.")
        if len(reads) > 1 and len({read.slot for read in reads}) < len(reads):
            raise ParameterError("a slot is read twice in one run", parameter="reads", fix="Put the tokens of a slot into one read.")
        for read in reads:
            self.require_room(read.slot, len(read.ids))

    def require_room(self, slot: int, count: int) -> None:
        """Raise ContextOverflow where the sequence has no room for `count` more tokens; make room where it has."""
        used = self._sequence(slot).length
        if used + count > self.capacity:
            raise ContextOverflow(
                "the context is full",
                got=f"{used} tokens read and {count} more",
                expected=f"at most {self.capacity}",
                fix=f"Shorten the input, or load with a larger {{max_context}}, at most {self.longest}.",
            )
        self._make_room(used + count, slot)
