"""The draft head over graphs of fixed shapes: one row, up to W rows with the logits of the last, up to T rows without logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.draft_head import WAITING, DraftHead
from qwen_export.runtimes.decoding.logit_rows import Row, Rows
from qwen_export.runtimes.decoding.rotary_tables import RotaryTables
from qwen_export.runtimes.decoding.static_graphs import HEAD_PROMPT, HEAD_STEP, HEAD_VERIFY, StaticGraph, StaticStates


class StaticDraftHead(DraftHead):
    """`sessions`: the head's graphs by name; `tables` are the decoder's."""

    def __init__(self, sessions: Mapping[str, Session], decoder: Decoder, tables: RotaryTables) -> None:
        self._graphs, self._tables = {name: StaticGraph(session) for name, session in sessions.items()}, tables
        step = self._graphs[HEAD_STEP]
        hidden, slots = step.controls["hidden"], decoder.batch
        log = step.session.buffer(hidden.dtype, (slots, decoder.chunk + WAITING, hidden.shape[-1]))
        super().__init__(decoder, log)
        self.states = [StaticStates(self._graphs) for _ in range(slots)]
        # What the next draft of a slot reads. With one slot it stays in the graph's own input.
        self._drafts = step.session.buffer(hidden.dtype, (slots, hidden.shape[-1])) if slots > 1 else None

    @property
    def busy_s(self) -> float:
        return sum(graph.session.busy_s for graph in self._graphs.values())

    @property
    def prepared_s(self) -> float:
        """Seconds in which calls were prepared, once for each."""
        return sum(graph.session.binding_s for graph in self._graphs.values())

    def prepare_round(self) -> None:
        """Make what the next drafts need: rows that plain steps have left are read, and calls prepared."""
        for slot in range(self._reader.batch):
            if self.behind(slot) > self._reader.widest_verify:
                self.catch_up(slot)
        self.prepare()

    def prepare(self) -> None:
        """Make what drafts need, so that the first takes no longer than the others. Between drafts; what the calls leave is not read."""
        for name, graph in self._graphs.items():
            if not self.states[0].prepared(name):
                graph.set(input_ids=graph.padded([]), length=[self.lengths[0]], logit_rows=[0])
                self.states[0].prepare(name, self._tables.of(0))

    def following(self, tokens: Mapping[int, int], depth: int) -> dict[int, Row]:
        """See DraftHead; slots take turns, so the rows of several are copied."""
        made = {}
        for slot, token in tokens.items():
            if self._drafts is not None:
                self._graphs[HEAD_STEP].controls["hidden"].copy_from(self._drafts, 0, slot * self._row_bytes, self._row_bytes)
            self._graphs[HEAD_STEP].place((), ())
            row = self._call(slot, HEAD_STEP, [token], self.lengths[slot] + depth - 1)
            made[slot] = row if len(tokens) == 1 else _copied(row)
        return made

    def first(self, tokens: Mapping[int, int]) -> dict[int, Row]:
        if len(tokens) == 1:
            return super().first(tokens)
        return {slot: _copied(super(StaticDraftHead, self).first({slot: token})[slot]) for slot, token in tokens.items()}

    def _read_rows(self, slot: int, tokens: Sequence[int], at: int, rows: int) -> Row:
        size = len(tokens) if rows else self._graphs[HEAD_PROMPT].T
        name = (HEAD_STEP if len(tokens) == 1 else HEAD_VERIFY) if rows else HEAD_PROMPT
        made = Rows.none()[0]
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            row = self._row_bytes
            self._graphs[name].controls["hidden"].copy_from(self._log, 0, at + start * row, len(part) * row)
            places, features = self._features(slot, start, len(part))
            self._graphs[name].place(features, places)
            made = self._call(slot, name, part, self.lengths[slot] + start)
        return made

    def _call(self, slot: int, name: str, tokens: Sequence[int], position: int) -> Row:
        """One call over the states that the graph has been given; the last one's own becomes the input of a following draft."""
        graph, last = self._graphs[name], len(tokens) - 1
        graph.set(input_ids=graph.padded(tokens), length=[position], logit_rows=[last])
        self.states[slot].run(name, self._tables.of(slot))
        if "hidden_out" in graph.results:
            row = self._row_bytes
            target, at = (self._graphs[HEAD_STEP].controls["hidden"], 0) if self._drafts is None else (self._drafts, slot * row)
            target.copy_from(graph.results["hidden_out"], at, last * row, row)
        return graph.logits()[0]


def _copied(row: Row) -> Row:
    return Rows.of(row.array[None].copy())[0]
