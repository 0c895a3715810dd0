"""Open tokens: the raw inputs that a verify leaves for the next call.

A verify commits nothing. It leaves its inputs of the recurrent layers *pending*, and the next call, given how many of them were accepted,
takes these into the states first. Rolling back means giving a smaller number; nothing is copied and nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from qwen_export.manifest import GraphSpec, StateSpec
from qwen_export.runtimes.memory.buffers import Buffer
from qwen_export.runtimes.memory.copies import Kept, put
from qwen_export.runtimes.memory.device import Device


class Transaction:
    """Pending inputs of all slots, with room for `width` tokens each.

    There are two sets of them: a call reads one while it fills the other. Which one a sequence's pending inputs are in is known per slot.
    Inputs of calls that commit go to a place that no call reads; `longest` is the number of tokens of the longest such call.
    """

    def __init__(self, spec: GraphSpec, device: Device, slots: int, width: int, longest: int) -> None:
        self.specs = [state for state in spec.states if state.pending]
        self.width = width
        shapes = {s.name: _sizes(s, {"B": slots, "P": width}) for s in self.specs}
        self._sets = tuple({s.name: device.buffer(s.dtype, shapes[s.name]) for s in self.specs} for _ in range(2))
        largest: dict[str, StateSpec] = {}
        for s in self.specs:
            largest[_key(s)] = max(largest.get(_key(s), s), s, key=lambda spec: prod(shapes[spec.name]))
        self._unread = {key: device.buffer(s.dtype, (prod(shapes[s.name][2:]) * max(longest, slots),)) for key, s in largest.items()}
        self._set_of = [0] * slots
        self.accepted = [0] * slots

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot in both sets."""
        return sum(buffer.row_bytes for one in self._sets for buffer in one.values())

    def inputs(self, which: int, first: int, count: int) -> dict[str, Buffer]:
        """What a call of `count` slots reads: set `which`."""
        return {name: buffer.rows(first, count) for name, buffer in self._sets[which].items()}

    def outputs(self, which: int, first: int, dims: Mapping[str, int], *, commit: bool) -> dict[str, Buffer]:
        """Where a call that reads set `which` leaves its inputs, by name of the output: in the other set; in a call that commits all
        layers write to one place, one after the other. An open call is of one sequence."""
        made = {}
        for s in self.specs:
            shape = _sizes(s, {**dims, "P": dims["T"]})
            if commit:
                made[s.after] = self._unread[_key(s)].part(s.dtype, shape)
            else:
                buffer = self._sets[1 - which][s.name]
                made[s.after] = buffer.part(s.dtype, shape, first * buffer.row_bytes)
        return made

    def gather(self, slots: Iterable[int]) -> int:
        """Bring what is pending in these slots into one set, and return which."""
        pending = [slot for slot in slots if self.accepted[slot]]
        if not pending:
            return 0
        which = self._set_of[pending[0]]
        for slot in pending[1:]:
            if self._set_of[slot] != which:
                for name, target in self._sets[which].items():
                    target.copy_from(self._sets[1 - which][name], slot * target.row_bytes, slot * target.row_bytes, target.row_bytes)
                self._set_of[slot] = which
        return which

    def opened(self, slot: int, which: int, count: int) -> None:
        """A call that read set `which` has left `count` tokens open."""
        self._set_of[slot] = 1 - which
        self.accepted[slot] = count

    def committed(self, slot: int) -> None:
        """A call has taken in what was accepted, and left nothing."""
        self.accepted[slot] = 0

    def load(self, slot: int, accepted: int, saved: Mapping[str, Kept]) -> None:
        """What was pending in a slot, as copies of what `held` had."""
        for name, kept in saved.items():
            if name in self._sets[self._set_of[slot]]:
                buffer = self._sets[self._set_of[slot]][name]
                put(buffer, slot * buffer.row_bytes, 0, kept)
        self.accepted[slot] = accepted

    def held(self, slot: int) -> dict[str, Buffer]:
        """The set that has what is pending in a slot, by name; empty when nothing is."""
        return dict(self._sets[self._set_of[slot]]) if self.accepted[slot] else {}


def _sizes(state: StateSpec, dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else dims[d] for d in state.shape)


def _key(state: StateSpec) -> str:
    """`pending_ab` of `layers.3.pending_ab`."""
    return state.name.rsplit(".", 1)[-1]
