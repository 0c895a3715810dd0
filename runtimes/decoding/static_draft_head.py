"""The draft head over graphs of fixed shapes: one row, up to W rows with the logits of the last, up to T rows without logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen_export.runtimes.backends.onnxruntime.onnxruntime_session import Session
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.draft_head import WAITING, DraftHead
from qwen_export.runtimes.decoding.logit_rows import Row, Rows
from qwen_export.runtimes.decoding.static_graphs import HEAD_PROMPT, HEAD_STEP, HEAD_VERIFY, StaticGraph, StaticStates
from qwen_export.runtimes.memory.buffers import Buffer


class StaticDraftHead(DraftHead):
    """`sessions`: the head's graphs by name; `tables` are the decoder's."""

    def __init__(self, sessions: Mapping[str, Session], decoder: Decoder, tables: Mapping[str, Buffer]) -> None:
        self._graphs = {name: StaticGraph(session) for name, session in sessions.items()}
        hidden = self._graphs[HEAD_STEP].controls["hidden"]
        log = sessions[HEAD_STEP].buffer(hidden.dtype, (decoder.chunk + WAITING, hidden.shape[-1]))
        super().__init__(decoder, log)
        self.states = StaticStates(self._graphs, tables)

    @property
    def busy_s(self) -> float:
        return sum(graph.session.busy_s for graph in self._graphs.values())

    @property
    def prepared_s(self) -> float:
        """Seconds in which calls were prepared, once for each."""
        return sum(graph.session.binding_s for graph in self._graphs.values())

    def prepare(self) -> None:
        """Make what drafts need, so that the first takes no longer than the others. Between drafts; what the calls leave is not read."""
        for name, graph in self._graphs.items():
            if not self.states.prepared(name):
                graph.set(input_ids=graph.padded([]), length=[self.length], logit_rows=[0])
                self.states.prepare(name)

    def following(self, token: int, depth: int) -> Row:
        return self._call(HEAD_STEP, [token], self.length + depth - 1)

    def _read_rows(self, tokens: Sequence[int], first: int, rows: int) -> Row:
        size = len(tokens) if rows else self._graphs[HEAD_PROMPT].T
        name = (HEAD_STEP if len(tokens) == 1 else HEAD_VERIFY) if rows else HEAD_PROMPT
        made = Rows.none()[0]
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            row = self._log.row_bytes
            self._graphs[name].controls["hidden"].copy_from(self._log, 0, (first + start) * row, len(part) * row)
            made = self._call(name, part, self.length + start)
        return made

    def _call(self, name: str, tokens: Sequence[int], position: int) -> Row:
        """One call over the states that the graph has been given; the last one's own becomes the input of a following draft."""
        graph, last = self._graphs[name], len(tokens) - 1
        graph.set(input_ids=graph.padded(tokens), length=[position], logit_rows=[last])
        self.states.run(name)
        if "hidden_out" in graph.results:
            row = self._log.row_bytes
            self._graphs[HEAD_STEP].controls["hidden"].copy_from(graph.results["hidden_out"], 0, last * row, row)
        return graph.logits()[0]
