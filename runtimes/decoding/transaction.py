"""Tokens whose fate is open: the raw inputs that a speculative call leaves for the next one.

A verify call commits nothing. It hands its inputs of the recurrent layers on as *pending*, and the next call, told how many of them were
accepted, takes these into the states first. Rolling back is saying a smaller number; nothing is copied and nothing is read twice.
"""

from __future__ import annotations

from math import prod

from qwen_export.manifest import GraphSpec, StateSpec
from qwen_export.runtimes.memory.buffers import Buffer, Bytes


class Transaction:
    """Pending inputs of one decoder: two sets of buffers with room for `width` tokens per sequence, one read by a call while it fills the
    other, and a place for the inputs of calls that commit, which nobody reads."""

    def __init__(self, spec: GraphSpec, kind: type[Buffer], batch: int, width: int, longest: int) -> None:
        self.specs = [state for state in spec.states if state.pending]
        self.width = width
        dims = {"B": batch, "P": width}
        shapes = {s.name: tuple(d if isinstance(d, int) else dims[d] for d in s.shape) for s in self.specs}
        self._sets = tuple({s.name: kind(s.dtype, shapes[s.name]) for s in self.specs} for _ in range(2))
        largest: dict[str, StateSpec] = {}
        for s in self.specs:
            largest[_key(s)] = max(largest.get(_key(s), s), s, key=lambda spec: prod(shapes[spec.name]))
        self._unread = {key: kind(s.dtype, (prod(shapes[s.name][2:]) * max(longest, batch),)) for key, s in largest.items()}
        self.current = 0
        self.accepted = [0] * batch

    def inputs(self, sequence: int) -> dict[str, int]:
        """Addresses of what a call takes in."""
        return {name: buffer.row_address(sequence) for name, buffer in self._sets[self.current].items()}

    def outputs(self, sequence: int, *, commit: bool) -> dict[str, int]:
        """Addresses of where a call leaves its inputs. In a call that commits the layers write to one place, one after the other."""
        other = self._sets[1 - self.current]
        return {s.after: self._unread[_key(s)].address if commit else other[s.name].row_address(sequence) for s in self.specs}

    def verified(self, sequence: int, count: int) -> None:
        """A call has left `count` tokens open."""
        self.current = 1 - self.current
        self.accepted[sequence] = count

    def committed(self, sequence: int) -> None:
        """A call has taken in what was accepted, and left nothing."""
        self.accepted[sequence] = 0

    def save(self, sequence: int) -> dict[str, Bytes]:
        """What is open, empty when nothing is."""
        return {name: b.read_row(sequence) for name, b in self._sets[self.current].items()} if self.accepted[sequence] else {}

    def load(self, sequence: int, accepted: int, saved: dict[str, Bytes]) -> None:
        self.accepted[sequence] = accepted
        for name, data in saved.items():
            if name in self._sets[self.current]:
                self._sets[self.current][name].write_row(sequence, data)


def _key(state: StateSpec) -> str:
    """`pending_ab` of `layers.3.pending_ab`."""
    return state.name.rsplit(".", 1)[-1]
