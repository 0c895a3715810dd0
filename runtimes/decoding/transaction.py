"""Open tokens: the raw inputs that a verify leaves for the next call.

A verify commits nothing. It leaves its inputs of the recurrent layers *pending*, and the next call, given how many of them were accepted,
takes these into the states first. Rolling back means giving a smaller number; nothing is copied and nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from qwen_export.manifest import GraphSpec, StateSpec
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.memory.buffers import Buffer
from qwen_export.runtimes.memory.copies import Kept, put
from qwen_export.runtimes.memory.device import Device


class _Place(NamedTuple):
    """Where inputs that no other call reads go: stage and device of the layer, and `pending_ab` of `layers.3.pending_ab`. Stages may run
    side by side, layers of one stage do not."""

    stage: int
    device: Device
    kind: str


class Transaction:
    """Pending inputs of all slots, with room for `width` tokens each.

    There are two sets of them: a call reads one while it fills the other. Which one a sequence's pending inputs are in is known per slot.
    A call of several slots leaves T tokens of each without gaps, so a set has a stride: slot i begins at token i * stride.
    Inputs of calls that commit go to a place that no call reads; `longest` is the number of tokens of the longest such call.
    """

    def __init__(self, spec: GraphSpec, session: Session, slots: int, width: int, longest: int) -> None:
        self.specs = [state for state in spec.states if state.pending]
        self.width = width
        shapes = {s.name: _sizes(s, {"B": slots, "P": width}) for s in self.specs}
        self._sets = tuple({s.name: session.device_of(s.name).buffer(s.dtype, shapes[s.name]) for s in self.specs} for _ in range(2))
        self._keys = {s.name: _Place(session.stage_of(s.name), session.device_of(s.name), s.name.rsplit(".", 1)[-1]) for s in self.specs}
        largest: dict[_Place, StateSpec] = {}
        for s in self.specs:
            key = self._keys[s.name]
            largest[key] = max(largest.get(key, s), s, key=lambda spec: prod(shapes[spec.name]))
        self._unread = {key: key.device.buffer(s.dtype, (prod(shapes[s.name][2:]) * max(longest, slots),)) for key, s in largest.items()}
        self._set_of = [0] * slots
        self.accepted = [0] * slots
        self._strides = [width, width]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot in both sets."""
        return sum(buffer.row_bytes for one in self._sets for buffer in one.values())

    def inputs(self, which: int, stride: int, first: int, count: int) -> dict[str, Buffer]:
        """What a call of `count` slots reads: set `which`, with a stride."""
        return {
            name: buffer.part(buffer.dtype, (count, stride, *buffer.shape[2:]), first * stride * self._token_bytes(buffer))
            for name, buffer in self._sets[which].items()
        }

    def outputs(self, which: int, stride: int, first: int, dims: Mapping[str, int]) -> dict[str, Buffer]:
        """Where a call that reads set `which` leaves its inputs, by name of the output: in the other set, which `make_way` has given a
        stride; in a call that commits, with stride 0, all layers write to one place, one after the other."""
        made = {}
        for s in self.specs:
            shape = _sizes(s, {**dims, "P": dims["T"]})
            if not stride:
                made[s.after] = self._unread[self._keys[s.name]].part(s.dtype, shape)
            else:
                buffer = self._sets[1 - which][s.name]
                made[s.after] = buffer.part(s.dtype, shape, first * stride * self._token_bytes(buffer))
        return made

    def gather(self, slots: Iterable[int]) -> tuple[int, int]:
        """Bring what is pending in these slots into one set; returns which, and its stride. 0 and 0 where nothing is pending: then it does
        not matter what a call reads."""
        pending = [slot for slot in slots if self.accepted[slot]]
        if not pending:
            return 0, 0
        which = self._set_of[pending[0]]
        moving = [slot for slot in pending if self._set_of[slot] != which]
        if moving:
            kept = self._read(1 - which, moving)
            self._lay_out(which, max(self._strides[which], *(self.accepted[slot] for slot in moving)))
            for slot in moving:
                self._set_of[slot] = which
            self._write(which, kept)
        return which, self._strides[which]

    def make_way(self, which: int, slots: Sequence[int], T: int) -> int:
        """Lay out the set that an open call of T tokens in these slots fills when it reads set `which`; returns its stride. 0 where others
        hold more tokens there than fit the stride of such a call: then each slot needs a call of its own."""
        target = 1 - which
        stride = T if len(slots) > 1 else max(T, self._strides[target])
        return stride if self._lay_out(target, stride, slots) else 0

    def opened(self, slot: int, which: int, count: int) -> None:
        """A call that read set `which` has left `count` tokens open."""
        self._set_of[slot] = 1 - which
        self.accepted[slot] = count

    def committed(self, slot: int) -> None:
        """A call has taken in what was accepted, and left nothing."""
        self.accepted[slot] = 0

    def held(self, slot: int) -> dict[str, tuple[Buffer, int, int]]:
        """What is pending in a slot, by name: buffer, first byte and bytes."""
        which, count = self._set_of[slot], self.accepted[slot]
        made = {}
        for name, buffer in self._sets[which].items() if count else ():
            size = self._token_bytes(buffer)
            made[name] = buffer, slot * self._strides[which] * size, count * size
        return made

    def load(self, slot: int, accepted: int, saved: Mapping[str, Kept]) -> None:
        """What was pending in a slot, as copies of what `held` had."""
        self.accepted[slot] = 0
        which = self._set_of[slot]
        self._lay_out(which, max(accepted, self._strides[which]))
        self.accepted[slot] = accepted
        for name, (buffer, offset, _) in self.held(slot).items():
            put(buffer, offset, 0, saved[name])

    # ---- layout ----

    def _lay_out(self, which: int, stride: int, leaving: Sequence[int] = ()) -> bool:
        """Give a set another stride. What is pending in it moves, that of `leaving` slots aside; False where it does not fit."""
        if stride == self._strides[which]:
            return True
        staying = [slot for slot, held in enumerate(self._set_of) if held == which and self.accepted[slot] and slot not in leaving]
        if any(self.accepted[slot] > stride for slot in staying):
            return False
        kept = self._read(which, staying)
        self._strides[which] = stride
        self._write(which, kept)
        return True

    def _read(self, which: int, slots: Sequence[int]) -> dict[int, dict[str, Kept]]:
        return {slot: {name: buffer.read(offset, size) for name, (buffer, offset, size) in self.held(slot).items()} for slot in slots}

    def _write(self, which: int, kept: Mapping[int, Mapping[str, Kept]]) -> None:
        for slot, rows in kept.items():
            for name, (buffer, offset, _) in self.held(slot).items():
                put(buffer, offset, 0, rows[name])

    def _token_bytes(self, buffer: Buffer) -> int:
        return buffer.row_bytes // self.width


def _sizes(state: StateSpec, dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else dims[d] for d in state.shape)
