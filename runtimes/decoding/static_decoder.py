"""The decoder over graphs of fixed shapes (`static_graphs.py` lists them).

A call with fewer real tokens is padded; `commit` tells the graph how many are real, and the others leave no trace. Only `verify` takes
tokens in that the call before left open: after a verify, the next call goes through it, whatever its size. A batch is several sequences
with buffers of their own, advanced one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qwen_export.errors import QwenExportError
from qwen_export.manifest import Manifest
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_session import Session
from qwen_export.runtimes.decoding.decoder import Decoder, Logits, Mark, Snapshot
from qwen_export.runtimes.decoding.logit_rows import Rows
from qwen_export.runtimes.decoding.static_draft_head import StaticDraftHead
from qwen_export.runtimes.decoding.static_graphs import (
    DECODER_GRAPHS,
    HEAD_GRAPHS,
    PROMPT,
    STEP,
    VERIFY,
    StaticGraph,
    StaticStates,
    rotary_tables,
)

_HEAD = "mtp."


class StaticDecoder(Decoder):
    """`batch` sequences over the graphs of a bundle, by name in `sessions`, each with room for `capacity` tokens. With `drafts` a draft
    head keeps up with a single sequence, where its graphs are among them."""

    limit = ("what the bundle was built for", "Lower --max-context, or build with a larger one.")
    no_verify = ("the bundle was built for steps of one token", "Build it again with a larger --step-tokens.")
    head: StaticDraftHead | None

    def __init__(
        self, sessions: Mapping[str, Session], manifest: Manifest, batch: int = 1, capacity: int | None = None, *, drafts: bool = False
    ) -> None:
        super().__init__(manifest, batch, capacity, manifest.max_context)
        self._graphs = {name: StaticGraph(sessions[name]) for name in DECODER_GRAPHS if name in sessions}
        self.chunk = self._graphs[PROMPT].T
        self.widest_verify = self._graphs[VERIFY].T if VERIFY in self._graphs else 0
        tables = rotary_tables(manifest, sessions[PROMPT])
        self._states = [StaticStates(self._graphs, tables) for _ in range(batch)]
        self._accepted = [0] * batch
        head = {name: sessions[name] for name in HEAD_GRAPHS if name in sessions}
        self.head = StaticDraftHead(head, self, tables) if drafts and head and batch == 1 else None

    def _prefill(self, ids: Sequence[int], sequence: int, chunk: int, want_logits: bool) -> Logits:
        if len(ids) <= max(1, self.widest_verify):
            rows, last = self._read(sequence, self._for(sequence, len(ids)), ids), len(ids) - 1
        else:
            start, last = 0, len(ids) - 1
            if self._accepted[sequence]:
                start = min(self.widest_verify, last)
                self._read(sequence, VERIFY, ids[:start])
            while start < last:
                part = ids[start : min(start + chunk, last)]
                self._read(sequence, PROMPT, part)
                start += len(part)
            rows, last = self._read(sequence, STEP, ids[last:]), 0
        return rows.array[last] if want_logits else np.empty(0, np.float32)

    def read(self, ids: Sequence[int], sequence: int = 0) -> Logits:
        """Read tokens; returns the logits of all of them, f32[T,V]. The prompt graph has no logits: it reads what comes before each token
        anew, and a step reads the token. For measuring, not for reading prompts."""
        self._check_room(sequence, len(ids))
        rows = []
        for start in range(0, len(ids), self.chunk):
            part, mark = ids[start : start + self.chunk], self.mark(sequence)
            for row, token in enumerate(part):
                self.rewind(mark, sequence)
                if row:
                    self._read(sequence, PROMPT, part[:row])
                rows.append(self._read(sequence, STEP, [token]).array[0].copy())
        return np.stack(rows)

    def step_rows(self, tokens: Sequence[int]) -> Rows:
        for sequence in range(self.batch):
            self._check_room(sequence, 1)
        if self.batch == 1:
            return self._read(0, self._for(0, 1), tokens)
        # The sequences share the buffer of the logits.
        return Rows.of(np.stack([self._read(i, self._for(i, 1), [token]).array[0].copy() for i, token in enumerate(tokens)]))

    def _verify(self, tokens: Sequence[int], sequence: int) -> Rows:
        rows = self._read(sequence, VERIFY, tokens, commit=False)
        self._accepted[sequence] = len(tokens)
        return rows

    def _accept(self, count: int, sequence: int) -> None:
        self._accepted[sequence] = count

    def prepare(self, count: int) -> None:
        """As promised; before a verify the draft head reads what plain steps have left it."""
        if count > 1 and self.head is not None:
            if self.head.behind > self.widest_verify:
                self.head.catch_up()
            self.head.prepare()
        if self.batch == 1 and count <= max(1, self.widest_verify):
            self._prepare(self._for(0, count))

    def warm(self) -> None:
        """As promised, for the graphs of all calls."""
        for name in self._graphs:
            self._prepare(name, every=True)
        if self.head is not None:
            self.head.prepare()

    def _prepare(self, name: str, *, every: bool = False) -> None:
        """Calls of a graph, all of whose tokens are padding."""
        graph, states = self._graphs[name], self._states[0]
        if every or not states.prepared(name):
            graph.set(input_ids=graph.padded([]), length=[len(self._tokens[0])], accepted=[0], commit=[0])
            states.prepare(name, every=every)

    @property
    def busy_s(self) -> float:
        return sum(graph.session.busy_s for graph in self._graphs.values()) + (self.head.busy_s if self.head is not None else 0.0)

    @property
    def binding_s(self) -> float:
        return sum(graph.session.binding_s for graph in self._graphs.values()) + (self.head.prepared_s if self.head is not None else 0.0)

    def mark(self, sequence: int = 0) -> Mark:
        if self._accepted[sequence]:  # into the state: a call without tokens of its own
            self._read(sequence, VERIFY, [])
        waiting = self.head.save() if self.head is not None else np.zeros(0, np.uint8)
        states = self._states[sequence]
        return Mark(self.tokens(sequence), {name: states.now(name).read() for name in states.fixed}, waiting=waiting)

    def _load(self, mark: Mark, sequence: int) -> None:
        states = self._states[sequence]
        for name in states.fixed:
            buffer = states.now(name)
            buffer.write(mark.states.get(name, np.zeros(buffer.nbytes, np.uint8)))
        self._accepted[sequence] = 0

    def snapshot(self, sequence: int = 0) -> Snapshot:
        mark, used = self.mark(sequence), len(self._tokens[sequence])
        return Snapshot(mark, {name: states.used_rows(cache, used) for name, (states, cache) in self._caches(sequence).items()})

    def _load_caches(self, snapshot: Snapshot, sequence: int) -> None:
        for name, (states, cache) in self._caches(sequence).items():
            if name not in snapshot.caches:
                raise QwenExportError(
                    "the snapshot was taken without the draft head",
                    fix="Take it from a decoder that drafts, or restore it into one that does not.",
                )
            states.set_rows(cache, snapshot.caches[name])

    def _caches(self, sequence: int) -> dict[str, tuple[StaticStates, str]]:
        """Where each attention cache is, the draft head's among them."""
        states = self._states[sequence]
        heads = {f"{_HEAD}{name}": (self.head.states, name) for name in self.head.states.caches} if self.head is not None else {}
        return {name: (states, name) for name in states.caches} | heads

    def _for(self, sequence: int, count: int) -> str:
        """The graph for a few tokens."""
        return STEP if count == 1 and not self._accepted[sequence] else VERIFY

    def _read(self, sequence: int, name: str, ids: Sequence[int], *, commit: bool = True) -> Rows:
        """One call: logits of the tokens and of what pads them, none from the prompt graph, valid until the graph's next call."""
        graph, tokens = self._graphs[name], self._tokens[sequence]
        if self.head is not None:
            self.head.reserve(len(ids))
        # The accepted tokens of the last verify are in `tokens` and in the caches; pending for the recurrent states only.
        graph.set(
            input_ids=graph.padded(ids), length=[len(tokens)], accepted=[self._accepted[sequence]], commit=[len(ids) if commit else 0]
        )
        self._states[sequence].run(name)
        if self.observer is not None:
            self.observer(len(tokens), len(ids), graph.results)
        tokens.extend(ids)
        self._accepted[sequence] = self._open[sequence] = 0
        if self.head is not None:
            self.head.append(graph.results["hidden"], len(ids))
        return graph.logits()
