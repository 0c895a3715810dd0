"""Which reads of a run share a call of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen_export.runtimes.decoding.read import Read


def plan_calls(reads: Sequence[Read], alone: Callable[[int], bool], empty: Callable[[int], bool], most: int) -> list[list[int]]:
    """Indices of `reads`, call by call, in the order of their slots.

    Committed reads in neighboring slots share a call where each has one token, or where all are as long and none has a past: their memory
    is one piece, and every kernel takes these. Others have a call of their own, since attention over a past takes one sequence with
    several tokens; so does a read with positions of its own. `alone(slot)`: the sequence shares no call, whatever it reads. `empty(slot)`:
    it has no past. A call has at most `most` tokens, those of one each aside."""
    if len(reads) == 1:
        return [[0]]

    def joins(last: Read, read: Read) -> bool:
        return (
            read.slot == last.slot + 1
            and len(read.ids) == len(last.ids)
            and (len(read.ids) == 1 or (empty(read.slot) and empty(last.slot)))
            and read.commit
            and last.commit
            and read.logits == last.logits
            and read.positions is None
            and last.positions is None
            and not alone(read.slot)
            and not alone(last.slot)
        )

    calls: list[list[int]] = []
    for index in sorted(range(len(reads)), key=lambda index: reads[index].slot):
        T = len(reads[index].ids)
        if calls and joins(reads[calls[-1][-1]], reads[index]) and (T == 1 or T * (len(calls[-1]) + 1) <= most):
            calls[-1].append(index)
        else:
            calls.append([index])
    return calls
