"""Which reads of a run share a call of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen_export.runtimes.decoding.read import Read


def plan_calls(reads: Sequence[Read], alone: Callable[[int], bool]) -> list[list[int]]:
    """Indices of `reads`, call by call, in the order of their slots.

    Committed reads of one token in neighboring slots share a call: their memory is one piece, and every kernel takes several sequences
    with one token each. Others have a call of their own, since attention over a past takes one sequence with several tokens. `alone(slot)`:
    the sequence shares no call, whatever it reads."""
    if len(reads) == 1:
        return [[0]]

    def joins(last: Read, read: Read) -> bool:
        return (
            read.slot == last.slot + 1
            and len(read.ids) == len(last.ids) == 1
            and read.commit
            and last.commit
            and read.logits == last.logits
            and not alone(read.slot)
            and not alone(last.slot)
        )

    calls: list[list[int]] = []
    for index in sorted(range(len(reads)), key=lambda index: reads[index].slot):
        if calls and joins(reads[calls[-1][-1]], reads[index]):
            calls[-1].append(index)
        else:
            calls.append([index])
    return calls
