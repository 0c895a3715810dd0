"""Drafts for several sequences: one round of the draft head for all of them, each with its own number of drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.sampling.sampler import NothingAllowedError
from qwen_export.runtimes.serving.served_call import ServedCall
from qwen_export.runtimes.speculation.acceptance import Draft
from qwen_export.runtimes.speculation.draft_policy import AdaptiveLength, KeptShares
from qwen_export.runtimes.speculation.drafters import LookupDrafter

_FEW_ROWS = 4
"""Rows up to which drafts may pay where a step reads the weights once for all rows, and a verify once for each."""
_FOLLOWED = 8
"""Rows up to which a draft head follows steps that draft nothing: it costs a copy for each, and a row to read."""


class DraftCounts:
    """How many drafts a step makes, by the number of its rows: measured for 1, 2, 3-4, 5-8, ... rows apart."""

    def __init__(self, decoder: Decoder, fixed: int | None) -> None:
        """`fixed`: always so many."""
        self.longest = max(0, decoder.widest_verify - 1) if fixed is None else fixed
        """The most drafts of a row."""
        self.adapts = fixed is None
        self._fixed, self._shared = fixed, decoder.idle_rows > 0
        self._few = self._shared and not decoder.shares_pasts
        self._policies: dict[int, AdaptiveLength] = {}
        self._kept = KeptShares(self.longest)

    def time_of(self, drafted: int, seconds: float) -> None:
        """What a step of one row with so many drafts takes, measured before there is a text."""
        self._policy(1).time_of(drafted, seconds)

    def length(self, rows: int) -> int:
        if self._fixed is not None:
            return self._fixed
        if self._few and rows > _FEW_ROWS:
            return 0
        return self._policy(rows).length(self.longest)

    def leaves_head(self, rows: int) -> bool:
        """Whether the draft head need not follow a step of so many rows that has no drafts."""
        return self.adapts and rows > _FOLLOWED

    def forced(self, rows: int) -> int:
        """The least number of forced tokens that are worth a verify of their own, in a step of so many rows; 0 where none is."""
        return 0 if self._few and rows > _FEW_ROWS else min(rows, 2)

    def observe(self, drafted: int, kept: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step with up to `drafted` drafts a row: those made and kept of each row."""
        if self._fixed is None and not (self._few and len(kept) > _FEW_ROWS):
            self._policy(len(kept)).observe_rows(drafted, kept, seconds)

    def _policy(self, rows: int) -> AdaptiveLength:
        size = (rows - 1).bit_length()
        if size not in self._policies:
            self._policies[size] = AdaptiveLength(self.longest, self._kept)
        return self._policies[size]


def draft(decoder: Decoder, calls: Mapping[int, ServedCall], counts: Mapping[int, int]) -> dict[int, list[Draft]]:
    """At most `counts` guesses for each slot, after the last token of each call's text, which is the last of its history."""
    if decoder.head is None:
        return {slot: _looked_up(decoder, call, counts[slot]) for slot, call in calls.items() if counts[slot]}
    drafts: dict[int, list[Draft]] = {slot: [] for slot in calls if counts[slot]}
    try:
        depth = 0
        while going := [slot for slot in drafts if counts[slot] > depth == len(drafts[slot])]:
            if depth:
                rows = decoder.head.following({slot: drafts[slot][-1].token for slot in going}, depth)
            else:
                rows = decoder.head.first({slot: calls[slot].text[-1] for slot in going})
            for slot in going:
                call = calls[slot]
                try:
                    distribution = call.request.sampler.distribution(rows[slot], call.history)
                except NothingAllowedError:  # the head knows fewer tokens than the model
                    continue
                made = Draft(call.acceptance.draft(distribution, depth), distribution)
                drafts[slot].append(made)
                call.history.push(made.token)
            depth += 1
    finally:
        for slot, made_here in drafts.items():
            for one in reversed(made_here):
                calls[slot].history.pop(one.token)
    return drafts


def _looked_up(decoder: Decoder, call: ServedCall, count: int) -> list[Draft]:
    if call.lookup is None:
        call.lookup = LookupDrafter(decoder, call.slot)
        call.lookup.begin()
    return list(call.lookup.draft(call.text[-1], count, call.request.sampler, call.acceptance, call.history))
