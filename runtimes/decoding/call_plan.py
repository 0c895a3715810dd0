"""Which reads of a run share a call of the graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from qwen_export.bundle_contract import COMMIT, LAST_SLOT, LENGTH
from qwen_export.runtimes.decoding.read import Read

_PASTS = {LENGTH: True, LAST_SLOT: False}
"""Whether attention takes several tokens of several sequences, each behind a past of its own, by the input that has the lengths: our kernel
does, and GroupQueryAttention where each sequence has one token or none has a past."""


class Sharing(NamedTuple):
    """What reads of one call may differ in."""

    pasts: bool = False
    """Each has several tokens behind a past of its own."""
    counts: bool = False
    """They have different numbers of tokens: shorter ones are padded, and the states take in what is committed only."""
    padding: int = 0
    """Tokens of padding that cost less than another call."""
    most: int = 1
    """Tokens of a call at most, padding included, those of one each aside."""

    @classmethod
    def of(cls, inputs: Collection[str], padding: int, most: int, *, recurrent: bool) -> Sharing:
        """`inputs`: names of the graph's inputs. `recurrent`: it has states that take in every token that is not held back."""
        pasts = any(name in inputs and takes for name, takes in _PASTS.items())
        return cls(pasts, pasts and (COMMIT in inputs or not recurrent), padding, most)


def plan_calls(
    reads: Sequence[Read], sharing: Sharing, lengths: Sequence[int], alone: Callable[[int], bool], capacity: int
) -> list[list[int]]:
    """Indices of `reads`, call by call, in the order of their slots.

    Reads in neighboring slots share a call where all commit or none does: their memory is one piece. `lengths`: tokens that each slot has,
    `capacity`: tokens that it has room for, padding included. `alone(slot)`: the sequence shares no call, whatever it reads; nor does a
    read with positions of its own, or with pictures."""
    if len(reads) == 1:
        return [[0]]

    def joins(call: Sequence[int], index: int) -> bool:
        last, read = reads[call[-1]], reads[index]
        if read.slot != last.slot + 1 or read.commit != last.commit or read.positions is not None or last.positions is not None:
            return False
        if read.places or last.places:
            return False
        if alone(read.slot) or alone(last.slot):
            return False
        members = [reads[i] for i in (*call, index)]
        T = max(len(one.ids) for one in members)
        if T == 1:
            return True
        padding = T * len(members) - sum(len(one.ids) for one in members)
        return (
            (sharing.pasts or (read.commit and not any(lengths[one.slot] for one in members)))
            and (not padding or (sharing.counts and padding <= sharing.padding * len(call)))
            and T * len(members) <= sharing.most
            and all(lengths[one.slot] + T <= capacity for one in members)
        )

    calls: list[list[int]] = []
    for index in sorted(range(len(reads)), key=lambda index: reads[index].slot):
        if calls and joins(calls[-1], index):
            calls[-1].append(index)
        else:
            calls.append([index])
    return calls
