"""A decoder: a machine with state, tokens in and logits out. Two kinds exist, for graphs with dynamic shapes (`dynamic_decoder.py`) and
for sets of graphs with fixed ones (`static_decoder.py`); what both promise, and what both do alike, is here.

Tokens are read and committed by `prefill`, `read` and `step`. `verify` reads tokens without committing them, and `accept` says how many
stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qwen_export.errors import ContextOverflow, QwenExportError
from qwen_export.manifest import Manifest
from qwen_export.runtimes.decoding.logit_rows import Rows
from qwen_export.runtimes.memory.buffers import Buffer, Bytes, encode

if TYPE_CHECKING:
    from qwen_export.runtimes.decoding.draft_head import DraftHead

Logits = npt.NDArray[np.float32]

Observer = Callable[[int, int, Mapping[str, Buffer]], None]
"""Told of a call of the decoder's graph: tokens read before it, tokens that it read, and by name the outputs that are no states, valid
until the next call. A call of fixed shape has more rows than tokens."""


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


class Decoder(ABC):
    """`batch` sequences, each with room for `capacity` tokens, at most `longest`."""

    chunk: int
    """Tokens that one call of a prompt reads at most."""
    widest_verify: int = 0
    """Tokens that one `verify` can read, 0 where the bundle cannot."""
    no_verify = ("the bundle was built without speculation", "Build it again without --no-mtp, or with --lookup.")
    """What to say then, and what to do about it."""
    limit = ("the model's", "Lower --max-context.")
    """Where the longest context comes from, and what to do about a longer one."""
    head: DraftHead | None = None
    observer: Observer | None = None
    """Who wants to see what else a graph says, such as the layers of one that was compiled to show them."""

    def __init__(self, manifest: Manifest, batch: int, capacity: int | None, longest: int) -> None:
        self.manifest, self.batch, self.longest = manifest, batch, longest
        self.capacity = capacity or manifest.max_context
        if not 0 < self.capacity <= longest:
            raise QwenExportError(
                f"the context is larger than {self.limit[0]}",
                got=self.capacity,
                expected=f"at most {longest}",
                fix=self.limit[1],
            )
        if batch < 1:
            raise QwenExportError("a decoder needs at least one sequence", got=batch)
        self._tokens: list[list[int]] = [[] for _ in range(batch)]
        self._open = [0] * batch
        self._binding_s = 0.0

    # ---- what was read ----

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence has read."""
        return [len(tokens) for tokens in self._tokens]

    def tokens(self, sequence: int = 0) -> tuple[int, ...]:
        return tuple(self._tokens[sequence])

    def tokens_from(self, position: int) -> list[int]:
        """What the first sequence has read from a position on."""
        return self._tokens[0][position:]

    # ---- reading ----

    def prefill(self, ids: Sequence[int], sequence: int = 0, chunk: int | None = None, *, want_logits: bool = True) -> Logits:
        """Read more tokens into one sequence, in calls of at most `chunk`; returns the last token's logits f32[V], empty when not wanted.
        Logits are valid until the next call."""
        if not len(ids):
            raise QwenExportError("there is nothing to read", got="no tokens", expected="at least one")
        self._check_room(sequence, len(ids))
        return self._prefill(ids, sequence, min(chunk or self.chunk, self.chunk), want_logits)

    @abstractmethod
    def read(self, ids: Sequence[int], sequence: int = 0) -> Logits:
        """Read tokens; returns the logits of all of them, f32[T,V]. For measuring: the number of tokens may be limited to `chunk`."""

    def step(self, tokens: Sequence[int]) -> Logits:
        """Advance every sequence by one token; returns logits f32[B,V], valid until the next call."""
        return self.step_rows(tokens).array

    def verify(self, tokens: Sequence[int], sequence: int = 0) -> Logits:
        """Read at most `widest_verify` tokens whose fate is open; returns the logits of all of them, f32[T,V], valid until the next call.
        `accept` must follow."""
        return self.verify_rows(tokens, sequence).array[: len(tokens)]

    @abstractmethod
    def step_rows(self, tokens: Sequence[int]) -> Rows:
        """As `step`, but the logits stay where they are until somebody asks for them."""

    def verify_rows(self, tokens: Sequence[int], sequence: int = 0) -> Rows:
        """As `verify`, likewise."""
        if not 0 < len(tokens) <= self.widest_verify:
            what, fix = ("a draft has the wrong length", "") if self.widest_verify else self.no_verify
            raise QwenExportError(
                what, got=len(tokens), expected=f"1 to {self.widest_verify} tokens" if self.widest_verify else "", fix=fix
            )
        self._check_room(sequence, len(tokens))
        logits = self._verify(tokens, sequence)
        self._open[sequence] = len(tokens)
        return logits

    def accept(self, count: int, sequence: int = 0) -> None:
        """Keep the first `count` tokens of the verify before. May be called again with a smaller number until the next call reads."""
        if not 0 <= count <= self._open[sequence]:
            raise QwenExportError("more tokens are accepted than were verified", got=count, expected=f"at most {self._open[sequence]}")
        del self._tokens[sequence][len(self._tokens[sequence]) - self._open[sequence] + count :]
        self._open[sequence] = count
        self._accept(count, sequence)
        if self.head is not None:
            self.head.cut()

    def prepare(self, count: int) -> None:  # noqa: B027 - fixed shapes need nothing
        """Make what a step (1) or a verify of `count` tokens needs, so that the first one takes no longer than the others."""

    def warm(self) -> None:
        """Do now what otherwise happens once, in the first answers: compiling, binding, recording. Changes nothing that was read."""
        mark = self.mark()
        self.prefill([0], want_logits=False)
        for count in range(1, 1 + (self.widest_verify if self.head is not None else 1)):
            self.prepare(count)
        self.rewind(mark)

    # ---- going back ----

    def reset(self, sequence: int = 0) -> None:
        """Forget everything the sequence has read."""
        self.rewind(Mark((), {}), sequence)

    @abstractmethod
    def mark(self, sequence: int = 0) -> Mark:
        """Remember this point of the sequence."""

    def rewind(self, mark: Mark, sequence: int = 0) -> None:
        """Make the sequence what it was at the mark, bit for bit; cache rows behind it are never read again."""
        length = len(mark.tokens)
        if tuple(self._tokens[sequence][:length]) != mark.tokens:
            raise QwenExportError("the mark belongs to other text than the sequence begins with", fix="Restore a snapshot instead.")
        self._load(mark, sequence)
        del self._tokens[sequence][length:]
        self._open[sequence] = 0
        if self.head is not None:
            self.head.load(mark.waiting)

    @abstractmethod
    def snapshot(self, sequence: int = 0) -> Snapshot:
        """Copy what the sequence has read: a mark and the used part of the caches."""

    def restore(self, snapshot: Snapshot, sequence: int = 0) -> None:
        """Make the sequence what it was at the snapshot, bit for bit, whatever it has read since."""
        length = len(snapshot.mark.tokens)
        if length > self.capacity:
            raise ContextOverflow(
                "the snapshot is longer than this decoder's context", got=length, expected=f"at most {self.capacity} tokens"
            )
        self._make_room(length)
        self._load_caches(snapshot, sequence)
        self._tokens[sequence][:] = snapshot.mark.tokens
        self.rewind(snapshot.mark, sequence)

    # ---- what it cost ----

    @property
    @abstractmethod
    def busy_s(self) -> float:
        """Seconds that the backend has worked for this decoder and its draft head, and others of the same sessions."""

    @property
    def binding_s(self) -> float:
        """Seconds spent on bindings, and on recording them, which happens once per kind of call."""
        return self._binding_s + (self.head.binding_s if self.head is not None else 0.0)

    # ---- for the kinds ----

    @abstractmethod
    def _prefill(self, ids: Sequence[int], sequence: int, chunk: int, want_logits: bool) -> Logits: ...

    @abstractmethod
    def _verify(self, tokens: Sequence[int], sequence: int) -> Rows: ...

    @abstractmethod
    def _accept(self, count: int, sequence: int) -> None: ...

    @abstractmethod
    def _load(self, mark: Mark, sequence: int) -> None:
        """Take the states of a mark."""

    @abstractmethod
    def _load_caches(self, snapshot: Snapshot, sequence: int) -> None: ...

    def _make_room(self, length: int) -> None:  # noqa: B027 - most have their full size from the start
        """Allocate what a sequence of `length` tokens needs."""

    def _check_room(self, sequence: int, count: int) -> None:
        used = len(self._tokens[sequence])
        if used + count > self.capacity:
            raise ContextOverflow(
                "the context is full",
                got=f"{used} tokens read and {count} more",
                expected=f"at most {self.capacity}",
                fix=f"Shorten the input, or load with a larger max_context, at most {self.longest}.",
            )
        self._make_room(used + count)


def rotary_table(manifest: Manifest, name: str, slots: int, dtype: str) -> tuple[tuple[int, int], Bytes]:
    """Shape [slots, D_rot / 2] and contents of table `name`, "cos" or "sin": a row per slot of the attention caches."""
    return (slots, len(manifest.rotary.inv_freq)), rotary_rows(manifest, name, 0, slots, dtype)


def rotary_rows(manifest: Manifest, name: str, start: int, stop: int, dtype: str) -> Bytes:
    """Contents of rows `start` to `stop` of table `name`."""
    rotary = manifest.rotary
    # fp32 products, as the reference computes them; then cos and sin of exactly those angles.
    angles = np.arange(start, stop, dtype=np.float32)[:, None] * np.asarray(rotary.inv_freq, np.float32)
    return encode((np.cos(angles) if name == "cos" else np.sin(angles)) * np.float32(rotary.scaling), dtype)
