"""One step on the decoder: rows of all running sequences, with drafts where they pay, then parts of prompts.

Rows that may share a call of the graph are one call. Between them may be slots without a row, which cost less than a second call: a slot
that reads a prompt reads one token of it there, and a free slot reads a token that is never used.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence

from qwen_export.errors import QwenExportError
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.logit_rows import Row, Rows
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.serving.batch_drafts import DraftCounts, draft
from qwen_export.runtimes.serving.choosing import choose
from qwen_export.runtimes.serving.chunk_budget import STALL, ChunkBudget
from qwen_export.runtimes.serving.served_call import ServedCall
from qwen_export.runtimes.speculation.acceptance import Draft

_BEHIND = 64
"""Rows that the draft head may be behind while nothing is drafted."""
_FILLER_TOKENS = 64
"""Tokens that a free slot reads before it is cleared: a short text costs attention next to nothing."""


class StepRunner:
    """`chosen(call, tokens)` takes the tokens that a step made for a call, `failed(call, error)` what ended it instead. `moved(call)` is
    called when a part of a call's text has been read, before a token is chosen."""

    def __init__(
        self,
        decoder: Decoder,
        drafts: DraftCounts | None,
        chosen: Callable[[ServedCall, list[int]], None],
        failed: Callable[[ServedCall, Exception], None],
        moved: Callable[[ServedCall], None],
        stall: float = STALL,
    ) -> None:
        self.decoder, self.budget = decoder, ChunkBudget(decoder.chunk, stall)
        self._drafts, self._chosen, self._failed, self._moved = drafts, chosen, failed, moved
        self.occupied: frozenset[int] = frozenset()
        """Slots of all running calls, which the caller sets before a step."""

    def run(self, rows: Sequence[ServedCall], parts: Sequence[tuple[ServedCall, int]]) -> None:
        """Read the last token of `rows` and so many tokens of `parts`; at the end of a text its next token is chosen."""
        decoder = self.decoder
        stops = [(call, decoder.sequences[call.slot].length + count) for call, count in parts]
        began, bound = time.perf_counter(), decoder.binding_s
        if rows:
            self._run_rows(rows, {call.slot: call for call, _ in parts})
        rows_s = time.perf_counter() - began - (decoder.binding_s - bound)
        spent: dict[int, float] = {}
        for group in self._alike(stops):
            began, bound = time.perf_counter(), decoder.binding_s
            read = self._run_part(*group[0]) if len(group) == 1 else self._run_alike(group)
            if read:
                spent[read] = time.perf_counter() - began - (decoder.binding_s - bound)
        self.budget.observe(len(rows), rows_s, spent)

    # ---- rows ----

    def _run_rows(self, calls: Sequence[ServedCall], reading: Mapping[int, ServedCall]) -> None:
        counts = self._counts(calls)
        longest = max(counts.values()) if counts else 0
        began, bound = time.perf_counter(), self.decoder.binding_s
        kept: list[tuple[int, int]] = []
        if longest:
            calls, drafts = self._drafted(calls, counts)
        else:
            drafts = {}
        plain = [call for call in calls if not drafts.get(call.slot)]
        for group in self._groups(plain, reading):
            kept += [(0, 0)] * self._run_group(group)
        for call in calls:
            if drafts.get(call.slot):
                kept.append((len(drafts[call.slot]), self._verify(call, drafts[call.slot])))
        if not longest and self.decoder.head is not None:
            self._keep_head_near(calls)
        if self._drafts is not None and kept:
            seconds = time.perf_counter() - began - (self.decoder.binding_s - bound)
            self._drafts.observe(longest, kept, seconds)

    def _keep_head_near(self, calls: Sequence[ServedCall]) -> None:
        """While there are no drafts the head falls behind. One sequence a step catches up: all at once would be a long step."""
        head = self.decoder.head
        going = [call for call in calls if not call.statistics.finish and self.decoder.sequences[call.slot].settled]
        if head is None or not going:
            return
        call = max(going, key=lambda call: head.behind(call.slot))
        if head.behind(call.slot) >= _BEHIND:
            try:
                head.catch_up(call.slot)
            except Exception as error:
                self._failed(call, error)

    def _counts(self, calls: Sequence[ServedCall]) -> dict[int, int]:
        """Drafts of each slot."""
        length = self._drafts.length(len(calls)) if self._drafts is not None else 0
        if not length:
            return {}
        counts = {}
        for call in calls:
            limit = self.decoder.capacity - len(call.text)
            if call.room is not None:
                limit = min(limit, call.room - 1)
            begun = self.decoder.sequences[call.slot].length > 0  # a draft follows a text
            counts[call.slot] = max(0, min(length, limit)) if begun else 0
        return counts

    def _drafted(self, calls: Sequence[ServedCall], counts: Mapping[int, int]) -> tuple[Sequence[ServedCall], dict[int, list[Draft]]]:
        """Calls that go on, and their drafts."""
        busy = self.decoder.busy_s
        try:
            drafts = draft(self.decoder, {call.slot: call for call in calls}, counts)
        except Exception as error:  # the head's memory is of no defined text
            for call in calls:
                self._failed(call, error)
            return [], {}
        share = (self.decoder.busy_s - busy) / len(calls)
        for call in calls:
            call.statistics.speculation.draft_s += share
        return calls, drafts

    def _groups(self, calls: Sequence[ServedCall], reading: Mapping[int, ServedCall]) -> list[list[ServedCall | int]]:
        """Calls that share a call of the graph, and between them slots that fill it: calls that read a prompt, or free slots."""
        taken = {call.slot: call for call in calls}
        if not calls or not self.decoder.idle_rows:
            return [[call] for call in calls]
        free = {slot for slot in range(self.decoder.batch) if slot not in self.occupied}
        groups: list[list[ServedCall | int]] = []
        last = -2
        for slot in sorted(taken):
            gap = range(last + 1, slot)
            fillers: list[ServedCall | int] = []
            if groups and len(gap) <= self.decoder.idle_rows:
                fillers = [reading.get(other, other) for other in gap if other in reading or other in free]
            if groups and len(fillers) == len(gap):
                groups[-1] += [*fillers, taken[slot]]
            else:
                groups.append([taken[slot]])
            last = slot
        first = calls[0] if not groups else groups[0][0]
        if len(groups) == 1 and self.decoder.idle_rows >= self.decoder.batch and isinstance(first, ServedCall):
            self._widen(groups[0], first.slot, last, free)
        return groups

    def _widen(self, group: list[ServedCall | int], first: int, last: int, free: set[int]) -> None:
        """Where rows are free, a step has 1, 2, 4, 8, ... of them from slot 0 on: those calls are recorded."""
        before = list(range(first))
        end = min(self.decoder.batch, 1 << last.bit_length() if last else 1)
        behind = list(range(last + 1, end))
        if all(slot in free for slot in (*before, *behind)):
            group[:0] = before
            group += behind

    def _run_group(self, group: Sequence[ServedCall | int]) -> int:
        """One token for each of these; returns the number of calls that got one."""
        reads, calls, places = [], [], []
        for one in group:
            if isinstance(one, int):
                self._clear(one)
                reads.append(Read(one, (0,)))
                continue
            slot, sequence = one.slot, self.decoder.sequences[one.slot]
            places.append(len(reads))
            calls.append(one)
            reads.append(Read(slot, (one.text[sequence.length],), media=one.media(sequence.length, sequence.length + 1)))
        try:
            results = self.decoder.run(reads)
        except Exception as error:
            for call in calls:
                self._failed(call, error)
            return 0
        for call in calls:
            if call.entering:
                self._moved(call)
        self._choose(calls, [results[place] for place in places])
        return len(calls)

    def _clear(self, slot: int) -> None:
        sequence = self.decoder.sequences[slot]
        if not sequence.settled or sequence.length >= _FILLER_TOKENS or sequence.length >= self.decoder.capacity:
            self.decoder.reset(slot)

    def _choose(self, calls: Sequence[ServedCall], results: Sequence[Rows]) -> None:
        """The next tokens of those whose text is read to its end."""
        ended, rows = [], []
        for call, result in zip(calls, results, strict=True):
            if self.decoder.sequences[call.slot].length == len(call.text):
                ended.append(call)
                rows.append(result[0])
        for call, token in zip(ended, choose(rows, ended), strict=True):
            if isinstance(token, Exception):
                self._failed(call, token)
            else:
                call.statistics.speculation.rounds += self._drafts is not None
                call.statistics.speculation.tokens += self._drafts is not None
                call.history.push(token)
                self._chosen(call, [token])

    def _verify(self, call: ServedCall, drafts: Sequence[Draft]) -> int:
        """One call over the last token and its drafts; returns how many drafts were kept."""
        decoder, slot, sampler, history = self.decoder, call.slot, call.request.sampler, call.history
        busy = decoder.busy_s
        try:
            [rows] = decoder.run([Read(slot, (call.text[-1], *(one.token for one in drafts)), commit=False, logits=1 + len(drafts))])
        except Exception as error:
            self._failed(call, error)
            return 0
        verify_s = decoder.busy_s - busy
        tokens: list[int] = []
        try:
            for place, one in enumerate((*drafts, None)):
                row: Row = rows[place]
                tokens.append(call.acceptance.token(sampler.distribution(row, history), one, len(tokens)))
                sampler.chosen(row, tokens[-1])
                history.push(tokens[-1])
                if one is None or tokens[-1] != one.token:
                    break
        except Exception as error:
            decoder.accept(0, slot)
            self._failed(call, error)
            return 0
        call.acceptance.advance(len(tokens))
        call.statistics.speculation.add(len(drafts), len(tokens) - 1, 0.0, verify_s)
        decoder.accept(len(tokens), slot)  # the last token and the drafts that were kept
        before = len(call.text)
        self._chosen(call, tokens)
        given = len(call.text) - before
        if given < len(tokens):  # the answer ended inside the round: the last token given out is not read yet
            decoder.accept(max(1, given), slot)
        return len(tokens) - 1

    # ---- parts of prompts ----

    def _alike(self, stops: Sequence[tuple[ServedCall, int]]) -> list[list[tuple[ServedCall, int]]]:
        """Parts, those in one list that may share a call: beginnings of texts of which as many tokens are read."""
        groups: dict[tuple[int, ...], list[tuple[ServedCall, int]]] = {}
        for call, stop in stops:
            if call.statistics.finish:
                continue
            begins = self.decoder.idle_rows > 0 and not self.decoder.sequences[call.slot].length
            key = (stop, stop == len(call.text)) if begins else (-1, call.slot)
            groups.setdefault(key, []).append((call, stop))
        return list(groups.values())

    def _run_alike(self, group: Sequence[tuple[ServedCall, int]]) -> int:
        """Beginnings of texts, of which as many tokens are read; returns the tokens of all."""
        calls, stop = [call for call, _ in group], group[0][1]
        last = stop == len(calls[0].text)
        try:
            rows = self.decoder.run([Read(call.slot, call.text[:stop], logits=int(last), media=call.media(0, stop)) for call in calls])
        except Exception as error:
            for call in calls:
                self._failed(call, error)
            return 0
        for call in calls:
            self._moved(call)
        if last:
            self._choose(calls, rows)
        return stop * len(calls)

    def _run_part(self, call: ServedCall, stop_at: int) -> int:
        """Read a text up to a position; returns the number of tokens read."""
        decoder, slot = self.decoder, call.slot
        begin = decoder.sequences[slot].length
        count = stop_at - begin
        if count <= 0:  # a step of others has read it
            return 0
        last = begin + count == len(call.text)
        rows = Rows.none()
        try:
            for start, stop, logits in decoder.parts(count, slot, want_logits=last):
                ids = call.text[begin + start : begin + stop]
                [rows] = decoder.run([Read(slot, ids, logits=logits, media=call.media(begin + start, begin + stop))])
        except Exception as error:
            self._failed(call, error)
            return count
        self._moved(call)
        if last:
            self._choose([call], [rows])
        return count


def ended_by(error: Exception) -> Exception:
    """What the reader of a stream gets: an error of its own, since several may get one from the same call."""
    if isinstance(error, QwenExportError):
        return copy.copy(error)
    own = QwenExportError(
        "a call of the model failed",
        got=f"{type(error).__name__}: {error}",
        fix="Send the request again; if it fails again, run `qwen-export verify` on the bundle.",
    )
    own.__cause__ = error
    return own
