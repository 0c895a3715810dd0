"""One step on the decoder: rows of all running sequences, with drafts where they pay, then parts of prompts.

Rows that may share a call of the graph are one call. Between them may be slots without a row, which cost less than a second call: a slot
that reads a prompt reads one token of it there, and a free slot reads a token that is never used.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from qwen_export.errors import QwenExportError
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.logit_rows import JoinedRows, Row, Rows
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.serving.batch_drafts import DraftCounts, draft
from qwen_export.runtimes.serving.choosing import choose
from qwen_export.runtimes.serving.chunk_budget import STALL, ChunkBudget
from qwen_export.runtimes.serving.served_call import ServedCall
from qwen_export.runtimes.serving.step_ahead import StepAhead
from qwen_export.runtimes.speculation.acceptance import Draft
from qwen_export.runtimes.speculation.drafters import forced_drafts

_BEHIND = 64
"""Rows that the draft head may be behind while nothing is drafted."""


class StepRunner:
    """`chosen(call, tokens)` takes the tokens that a step made for a call, `failed(call, error)` what ended it instead. `moved(call)` is
    called when a part of a call's text has been read, before a token is chosen. `same` as in `StepAhead`."""

    def __init__(
        self,
        decoder: Decoder,
        drafts: DraftCounts | None,
        chosen: Callable[[ServedCall, list[int]], None],
        failed: Callable[[ServedCall, Exception], None],
        moved: Callable[[ServedCall], None],
        stall: float = STALL,
        same: Callable[[int], bool] | None = None,
    ) -> None:
        self.decoder, self.budget, self.ahead = decoder, ChunkBudget(decoder.chunk, stall), StepAhead(decoder, same)
        self._drafts, self._chosen, self._failed, self._moved = drafts, chosen, failed, moved
        self.occupied: frozenset[int] = frozenset()
        """Slots of all running calls, which the caller sets before a step."""
        self.now = 0.0
        """When the tokens that are handed out were there."""

    def run(self, rows: Sequence[ServedCall], parts: Sequence[tuple[ServedCall, int]]) -> None:
        """Read the last token of `rows` and so many tokens of `parts`; at the end of a text its next token is chosen."""
        decoder = self.decoder
        stops = [(call, decoder.sequences[call.slot].length + count) for call, count in parts]
        began, bound = time.perf_counter(), decoder.binding_s
        if rows:
            self._run_rows(rows, {call.slot: call for call, _ in parts if call.request.prompt_recorder is None})
        rows_s = time.perf_counter() - began - (decoder.binding_s - bound)
        spent: list[tuple[int, float]] = []
        for group in self._alike(stops):
            began, bound = time.perf_counter(), decoder.binding_s
            read = self._run_part(*group[0]) if len(group) == 1 else self._run_parts(group)
            if read:
                spent.append((read, time.perf_counter() - began - (decoder.binding_s - bound)))
        self.budget.observe(len(rows), rows_s, spent)

    def land(self) -> tuple[Sequence[ServedCall], Sequence[ServedCall]]:
        """As `run` for a step that was launched ahead; returns the calls of its rows, and none of parts."""
        ahead, calls = self.ahead, self.ahead.calls
        try:
            results = ahead.land()
        except Exception as error:
            for call in calls:
                self._failed(call, error)
            return calls, ()
        seconds = time.perf_counter() - ahead.began
        self.budget.observe(len(calls), seconds, ())
        if self._drafts is not None:
            self._drafts.observe(0, [(0, 0)] * len(calls), seconds)
        self._choose(calls, results, ahead.group)
        return calls, ()

    # ---- rows ----

    def _run_rows(self, calls: Sequence[ServedCall], reading: Mapping[int, ServedCall]) -> None:
        counts = self._counts(calls)
        forced = self._forced(calls, counts)
        longest = max((count for slot, count in counts.items() if slot not in forced), default=0)
        began, bound = time.perf_counter(), self.decoder.binding_s
        kept: list[tuple[int, int]] = []
        drafts: dict[int, list[Draft]] = {}
        if longest:
            calls, drafts = self._drafted(calls, {slot: 0 if slot in forced else count for slot, count in counts.items()})
        drafts |= forced
        if (head := self.decoder.head) is not None and self._drafts is not None:
            head.follows = bool(drafts) or not (head.may_leave and self._drafts.leaves_head(len(calls)))
        verified = self._verified(calls, drafts)
        groups = self._groups([call for call in calls if call not in verified], reading)
        for group in groups:
            kept += [(0, 0)] * self._run_group(group, alone=len(groups) == 1 and not drafts)
        for group in self._groups(verified, reading, 1 + max(map(len, drafts.values()), default=0)):
            kept += self._verify(group, drafts)
        if not longest and head is not None and head.follows:
            self._keep_head_near(calls)
        if self._drafts is not None and kept and not forced:
            seconds = time.perf_counter() - began - (self.decoder.binding_s - bound)
            self._drafts.observe(longest, kept, seconds)

    def _verified(self, calls: Sequence[ServedCall], drafts: Mapping[int, Sequence[Draft]]) -> list[ServedCall]:
        """Calls with drafts, and those without that take part because their padding costs less than calls of their own."""
        drafting = [call for call in calls if drafts.get(call.slot)]
        others = [call for call in calls if not drafts.get(call.slot) and not call.points]
        if not drafting or not others or not self.decoder.shares_pasts:
            return drafting
        padding = len(others) * max(len(drafts[call.slot]) for call in drafting)
        kinds = [bool(drafts.get(slot)) for slot in sorted(call.slot for call in (*drafting, *others))]
        saved = sum(kind != following for kind, following in pairwise(kinds))
        return drafting + others if padding <= saved * self.decoder.idle_rows else drafting

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
        return {call.slot: min(length, self._most(call)) for call in calls} if length else {}

    def _most(self, call: ServedCall) -> int:
        """Drafts that a call may have."""
        limit = min(self.decoder.capacity - len(call.text), self.decoder.widest_verify - 1)
        if call.room is not None:
            limit = min(limit, call.room - 1)
        begun = self.decoder.sequences[call.slot].length > 0  # a draft follows a text
        return max(0, limit) if begun else 0

    def _forced(self, calls: Sequence[ServedCall], counts: Mapping[int, int]) -> dict[int, list[Draft]]:
        """Tokens that constraints force, as drafts, for those calls in which they are worth more than other drafts."""
        least = self._drafts.forced(len(calls)) if self._drafts is not None else 0
        found: dict[int, list[Draft]] = {}
        for call in calls if least else ():
            made = forced_drafts(call.request.sampler, call.history, self._most(call), max(least, counts.get(call.slot, 0)))
            if made:
                found[call.slot] = made
        return found

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

    def _groups(self, calls: Sequence[ServedCall], reading: Mapping[int, ServedCall], tokens: int = 1) -> list[list[ServedCall | int]]:
        """Calls that share a call of the graph, each with so many tokens, and between them slots that fill it: calls that read a prompt, or
        free slots."""
        taken = {call.slot: call for call in calls}
        if not calls or not self.decoder.idle_rows or (tokens > 1 and not self.decoder.shares_pasts):
            return [[call] for call in calls]
        free = {slot for slot in range(self.decoder.batch) if slot not in self.occupied}
        groups: list[list[ServedCall | int]] = []
        last = -2
        for slot in sorted(taken):
            gap = range(last + 1, slot)
            fillers: list[ServedCall | int] = []
            if groups and len(gap) * tokens <= self.decoder.idle_rows:
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

    def _run_group(self, group: Sequence[ServedCall | int], *, alone: bool) -> int:
        """One token for each of these; returns the number of calls that got one. `alone`: the step has no other rows."""
        calls, places, tokens, sequences = [], [], [], self.decoder.sequences
        first = next(one if isinstance(one, int) else one.slot for one in group)
        pictures = any(not isinstance(one, int) and one.request.media for one in group)
        self.ahead.clear(group)
        for place, one in enumerate(group):
            if isinstance(one, int):
                tokens.append(0)
            else:
                places.append(place)
                calls.append(one)
                tokens.append(one.text[len(sequences[one.slot].tokens)])
        for call in calls:
            if call.request.sampler.constraint is not None and len(sequences[call.slot].tokens) + 1 == len(call.text):
                call.request.sampler.ahead(call.history)
        try:
            results = self._advance_with_media(group, tokens) if pictures else self.decoder.advance(tokens, first)
        except Exception as error:
            for call in calls:
                self._failed(call, error)
            return 0
        for call in calls:
            if call.points:
                self._moved(call)
        self._choose(calls, [results[place] for place in places], group if alone else ())
        return len(calls)

    def _advance_with_media(self, group: Sequence[ServedCall | int], tokens: Sequence[int]) -> Rows:
        """As `Decoder.advance`, where a token may be the last one of a picture."""
        reads = []
        for one, token in zip(group, tokens, strict=True):
            length = 0 if isinstance(one, int) else self.decoder.sequences[one.slot].length
            reads.append(Read(one, (token,)) if isinstance(one, int) else one.read(length, length + 1))
        return JoinedRows(self.decoder.run(reads))

    def _choose(self, calls: Sequence[ServedCall], results: Sequence[Row], group: Sequence[ServedCall | int] = ()) -> None:
        """The next tokens of those whose text is read to its end. `group`: the rows of the step, where it may come again."""
        ended, rows, sequences, self.now = [], [], self.decoder.sequences, time.perf_counter()
        for call, row in zip(calls, results, strict=True):
            if len(sequences[call.slot].tokens) == len(call.text):
                ended.append(call)
                rows.append(row)
        tokens = choose(rows, ended)
        if group and len(ended) == len(calls) and self._plain(calls):
            self.ahead.launch(group, calls, tokens)
        for call, token in zip(ended, tokens, strict=True):
            if isinstance(token, Exception):
                self._failed(call, token)
                continue
            if self._drafts is not None:
                call.statistics.speculation.rounds += 1
                call.statistics.speculation.tokens += 1
            call.history.push(token)
            self._chosen(call, [token])

    def _plain(self, calls: Sequence[ServedCall]) -> bool:
        """Whether the next step has no drafts and leaves none of its calls far behind the draft head."""
        if self._drafts is not None and self._drafts.length(len(calls)):
            return False
        head = self.decoder.head
        return head is None or not head.follows or all(head.behind(call.slot) < _BEHIND for call in calls)

    def _verify(self, group: Sequence[ServedCall | int], drafts: Mapping[int, Sequence[Draft]]) -> list[tuple[int, int]]:
        """The last token of these and their drafts; returns how many drafts each had, and how many were kept. Slots that only fill the call
        read a token that is taken back."""
        kept, reads, sequences = [], [], self.decoder.sequences
        for one in group:
            slot = one if isinstance(one, int) else one.slot
            if isinstance(one, int) or (slot not in drafts and sequences[slot].length < len(one.text) - 1):
                if not sequences[slot].settled:
                    self.decoder.reset(slot)
                reads.append(Read(slot, (0,), commit=False, logits=0))
                continue
            made, length = drafts.get(slot, ()), sequences[slot].length
            ids = (one.text[-1], *(draft.token for draft in made))
            reads.append(one.verify(length, ids))
        for indices in self.decoder.plan(reads):
            members = [(group[index], reads[index]) for index in indices]
            calls = [one for one, read in members if isinstance(one, ServedCall) and read.logits]
            for call in calls:
                call.request.sampler.ahead(call.history, [one.token for one in drafts.get(call.slot, ())])
            busy = self.decoder.busy_s
            try:
                results = self.decoder.run([read for _, read in members]) if calls else []
            except Exception as error:
                for call in calls:
                    self._failed(call, error)
                continue
            share, self.now = (self.decoder.busy_s - busy) / max(1, len(calls)), time.perf_counter()
            for (one, read), rows in zip(members, results, strict=False):
                if isinstance(one, ServedCall) and read.logits:
                    made = drafts.get(one.slot, ())
                    kept.append((len(made), self._accept(one, made, rows, share)))
                else:
                    self.decoder.accept(0, read.slot)
        return kept

    def _accept(self, call: ServedCall, drafts: Sequence[Draft], rows: Rows, verify_s: float) -> int:
        """Choose what follows a call's last token and its drafts, up to the first that is another token; returns how many were kept."""
        decoder, slot, sampler, history = self.decoder, call.slot, call.request.sampler, call.history
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
        """Parts, those in one list that share a call. One whose log probabilities are wanted has calls of its own."""
        alone, going, reads = [], [], []
        for call, stop in stops:
            if call.statistics.finish or not self._left(call, stop):
                continue
            if call.request.prompt_recorder is not None:
                alone.append([(call, stop)])
                continue
            reads.append(self._part(call, stop))
            going.append((call, stop))
        plan = self.decoder.plan(reads) if reads else []
        return [*alone, *([going[index] for index in indices] for indices in plan)]

    def _left(self, call: ServedCall, stop: int) -> int:
        """Tokens up to a position of the text; a step of others may have read one."""
        return stop - self.decoder.sequences[call.slot].length

    def _part(self, call: ServedCall, stop: int) -> Read:
        begin = self.decoder.sequences[call.slot].length
        return call.read(begin, stop, int(stop == len(call.text)))

    def _run_parts(self, group: Sequence[tuple[ServedCall, int]]) -> int:
        """Parts that share a call; returns the tokens of all."""
        reads = [self._part(call, stop) for call, stop in group]
        try:
            results = self.decoder.run(reads)
        except Exception as error:
            for call, _ in group:
                self._failed(call, error)
            return 0
        for call, _ in group:
            self._moved(call)
        ended = [(call, rows[0]) for (call, _), read, rows in zip(group, reads, results, strict=True) if read.logits]
        self._choose([call for call, _ in ended], [row for _, row in ended])
        return sum(len(read.ids) for read in reads)

    def _run_part(self, call: ServedCall, stop_at: int) -> int:
        """Read a text up to a position; returns the number of tokens read."""
        decoder, slot = self.decoder, call.slot
        begin, count = decoder.sequences[slot].length, self._left(call, stop_at)
        if count <= 0:  # a step of others has read it
            return 0
        last = begin + count == len(call.text)
        rows = Rows.none()
        try:
            recorder = call.request.prompt_recorder
            for start, stop, logits in decoder.parts(count, slot, decoder.logit_tokens if recorder else None, want_logits=last):
                [rows] = decoder.run([call.read(begin + start, begin + stop, stop - start if recorder else logits)])
                if recorder is not None:
                    recorder.add(rows, call.ids[begin + start + 1 : begin + stop + 1].tolist())
                    rows = rows.part(stop - start - 1)
        except Exception as error:
            self._failed(call, error)
            return count
        self._moved(call)
        if last:
            self._choose([call], [rows[0]])
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
