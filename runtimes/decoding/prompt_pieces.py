"""A long prompt over a model in stages: while a stage reads one piece of it, the stage before reads the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from qwen_export.errors import ParameterError
from qwen_export.runtimes.decoding.bound_call import BoundCall
from qwen_export.runtimes.decoding.call_shape import CallShape
from qwen_export.runtimes.decoding.draft_head import DraftHead
from qwen_export.runtimes.decoding.logit_rows import Rows
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.decoding.rotary_tables import RotaryTables
from qwen_export.runtimes.decoding.sequence import Change, SequenceState
from qwen_export.runtimes.decoding.transaction import Transaction
from qwen_export.runtimes.memory.buffers import Buffer


class _Piece(NamedTuple):
    """A call that was started for tokens `start` .. `stop - 1` of a read."""

    call: BoundCall
    turn: int
    start: int
    stop: int


class PromptPieces:
    """`size` tokens are one piece, at most `turns` pieces are under way, and each of those has a buffer in `hidden`, if there are any.
    `call` returns the bindings for a shape."""

    def __init__(
        self,
        size: int,
        turns: int,
        hidden: Sequence[Buffer],
        tables: RotaryTables,
        transaction: Transaction,
        call: Callable[[CallShape], BoundCall],
    ) -> None:
        self._size, self._turns, self._hidden = size, turns, hidden
        self._tables, self._transaction, self._call = tables, transaction, call

    def read(self, read: Read, sequence: SequenceState, head: DraftHead | None) -> Rows:
        """Read tokens that are committed into one sequence."""
        last = 1 + (len(read.ids) - 1) % self._size
        if read.logits > last:
            raise ParameterError(
                "a read of several pieces has logits for its last piece only",
                parameter="logits",
                got=read.logits,
                expected=f"at most {last}",
                fix=f"Read at most {self._size} tokens at a time.",
            )
        slot, begin, rows = read.slot, sequence.length, Rows.none()
        started: deque[_Piece] = deque()
        with Change([sequence]):
            if read.positions is not None or self._tables.own(slot):
                self._tables.place(slot, begin, read.positions, len(read.ids))
            pending, stride = self._transaction.gather(range(slot, slot + 1))
            accepted, own = self._transaction.accepted[slot], self._tables.own(slot)
            try:
                for number, start in enumerate(range(0, len(read.ids), self._size)):
                    if len(started) == self._turns:
                        rows = self._finish(started.popleft(), read, begin, sequence, head)
                    stop, turn = min(len(read.ids), start + self._size), number % self._turns
                    logits = read.logits if stop == len(read.ids) else 0
                    call = self._call(CallShape(1, stop - start, logits, slot, True, pending, stride, own=own, turn=turn))
                    call.start(read.ids[start:stop], [begin + start], accepted=[0 if number else accepted], commit=[stop - start])
                    started.append(_Piece(call, turn, start, stop))
                while started:
                    rows = self._finish(started.popleft(), read, begin, sequence, head)
            finally:
                for piece in started:  # after a failure: nothing may run on behind this call
                    with suppress(Exception):
                        piece.call.finish()
            self._transaction.committed(slot)
        return rows

    def _finish(self, piece: _Piece, read: Read, begin: int, sequence: SequenceState, head: DraftHead | None) -> Rows:
        """Wait for a piece, and take note of what it has read."""
        rows, count = piece.call.finish(), piece.stop - piece.start
        if head is not None:
            head.reserve(read.slot, count)
        media = tuple(one for one in read.media if begin + piece.start < one.start + one.count <= begin + piece.stop)
        sequence.extend(read.ids[piece.start : piece.stop], media, commit=True)
        if head is not None and self._hidden:
            head.append(read.slot, self._hidden[piece.turn], 0, count)
        return rows
