"""How many tokens of prompts a step may read while others wait for their next token.

A step in which a prompt is read takes at most `stall` times what it takes without. Both times are measured in every step: what the rows
took, and what a part of a text took, by its size.

Short prompts that come many at once would wait long under that rule, so there is credit: time that earlier steps did not take of what
they might have. Prompts that it suffices for are read as fast as it goes until it is used up; a long prompt uses none of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen_export.errors import ParameterError

STALL = 2.5
"""The longest time between two tokens while a prompt is read, in times without one, when the caller gives none."""
SMALLEST = 2
"""Tokens of the smallest part, which is read whatever it takes: a prompt always goes on."""
_FOLLOW = 0.25
# How fast a mean follows: one slow step of a busy machine moves it by a quarter.
_AIM = 0.9
# The share of the longest time that is planned for: what is measured varies.
_FORGET = 0.995
# What the time of a size still counts after a step that read a smaller one: the machine may have been slow, so it is tried again.
_TRY = 1.25
# Of the first size measured, the next takes so much more: most of a small part's time is that of the weights.
_PARTS = 4
"""Parts that share a step at most while others wait; each has a cost of its own beside its tokens."""
_IDLE_PARTS = 32
"""The same while none waits."""
_MOST_CREDIT_S = 0.1
# Seconds that an answer may once be late by: some ten words of a fast reader.


class ChunkBudget:
    """`longest`: tokens of one read at most; `stall` inf: always so many. Sizes are powers of two, so that few shapes of calls exist."""

    def __init__(self, longest: int, stall: float = STALL) -> None:
        if not stall > 1:
            raise ParameterError(
                "no prompt can be read in no time",
                parameter="stall",
                got=stall,
                expected="a number above 1",
                fix="Give the longest time between two tokens while a prompt is read, in times without one.",
            )
        self._longest, self._stall = longest, stall
        self._alone: dict[int, float] = {}
        self._beside: dict[int, float] = {}
        self._parts: dict[int, float] = {}
        self._credit_s = _MOST_CREDIT_S

    def observe(self, rows: int, rows_s: float, parts: Sequence[tuple[int, float]]) -> None:
        """A step of so many rows: their seconds, and tokens and seconds of its parts."""
        if rows:
            alone = self._alone.get(_power(rows), rows_s)
            earned = 0.0 if self._stall == float("inf") else (self._stall - 1) * alone
            self._credit_s = min(_MOST_CREDIT_S, self._credit_s + earned - max(0.0, rows_s - alone) - sum(s for _, s in parts))
            # Rows are slower beside a prompt, which takes the caches of the processor from them.
            table, size = (self._beside if parts else self._alone), _power(rows)
            known = table.get(size)
            table[size] = rows_s if known is None else known + (rows_s - known) * _FOLLOW
        for count, seconds in parts:
            size = _power(count)
            seconds *= size / count if count > size // 2 else 1.0
            known = self._parts.get(size)
            self._parts[size] = seconds if known is None else known + (seconds - known) * _FOLLOW
            for larger in [other for other in self._parts if other > size]:
                self._parts[larger] *= _FORGET

    def tokens(self, rows: int, longest: int = 0) -> tuple[int, int]:
        """Tokens of texts that the next step may read beside so many rows, and what each part counts at least. `longest`: tokens of the
        longest text that had to be read when it came."""
        budget, parts = self._longest, _PARTS if rows else _IDLE_PARTS
        if rows and longest and (at_once := self._affordable()) >= longest:
            at_once = min(budget, at_once)
            return at_once, max(1, at_once // _IDLE_PARTS)
        if rows and self._stall != float("inf"):
            beside = self._beside.get(_power(rows))
            alone = self._alone.get(_power(rows), beside or 0.0)
            allowed, size = _AIM * self._stall * alone - max(alone, beside or 0.0), SMALLEST
            while 2 * size <= self._longest and self._seconds(2 * size) <= allowed:
                size *= 2
            budget = min(size, self._longest)
        return budget, max(1, budget // parts)

    def _affordable(self) -> int:
        """Tokens that the credit is enough for, as fast as the fastest part was."""
        fastest = min((seconds / size for size, seconds in self._parts.items()), default=0.0)
        return int(self._credit_s / fastest) if fastest else 0

    def _seconds(self, size: int) -> float:
        """What a part takes: measured, or on the line through the two sizes below."""
        if size in self._parts:
            return self._parts[size]
        smaller = sorted(known for known in self._parts if known < size)[-2:]
        if not smaller:
            return float("inf")
        last = self._parts[smaller[-1]]
        if len(smaller) == 1:
            return last * _TRY if size <= 2 * smaller[0] else float("inf")
        slope = (last - self._parts[smaller[0]]) / (smaller[1] - smaller[0])
        return last + max(0.0, slope) * (size - smaller[1])


def _power(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
