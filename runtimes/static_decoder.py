"""The decoder over graphs of fixed shapes: one reads prompts C tokens at a time, one makes steps of W tokens.

A call with fewer real tokens is padded; `commit` tells the graph how many are real, and the others leave no trace. States that a graph
does not write in place have two buffers, which change places after a call. A batch is several sequences with buffers of their own,
advanced one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export.manifest import GraphSpec, Manifest
from qwen_export.runtimes.buffers import Buffer, as_bytes
from qwen_export.runtimes.decoder import Decoder, Logits, Mark, Snapshot, rotary_table
from qwen_export.runtimes.logits import TOP_IDS, TOP_LOGITS, LogitsBuffers, Rows
from qwen_export.runtimes.onnxruntime_session import Call, Session

STEP, PROMPT = "decoder", "prefill"


def is_static(manifest: Manifest) -> bool:
    return PROMPT in manifest.graphs


class StaticDecoder(Decoder):
    """`batch` sequences over the two graphs of a bundle, each with room for `capacity` tokens. There is no draft head; `verify` reads
    drafts from elsewhere."""

    limit = ("what the bundle was built for", "Lower --max-context, or build with a larger one.")
    no_verify = ("the bundle was built for steps of one token", "Build it again with a larger --step-tokens.")

    def __init__(self, steps: Session, prompts: Session, manifest: Manifest, batch: int = 1, capacity: int | None = None) -> None:
        super().__init__(manifest, batch, capacity, manifest.max_context)
        self.session = steps
        self._graphs = {STEP: _Graph(steps), PROMPT: _Graph(prompts)}
        self.chunk, self.width = self._graphs[PROMPT].T, self._graphs[STEP].T
        self.widest_verify = self.width if self.width > 1 else 0
        tables = {name: self._rows(prompts, name) for name in ("cos", "sin")}
        self._sequences = [_Sequence(self._graphs, tables, tokens) for tokens in self._tokens]

    def _prefill(self, ids: Sequence[int], sequence: int, chunk: int, want_logits: bool) -> Logits:
        memory = self._sequences[sequence]
        start, last = 0, len(ids) - min(self.width, len(ids))
        if memory.accepted and last:  # only the step graph takes pending tokens in
            start = min(self.width, last)
            self._read(memory, STEP, ids[:start])
        while start < last:
            part = ids[start : min(start + chunk, last)]
            self._read(memory, PROMPT, part)
            start += len(part)
        rows, count = self._read(memory, STEP, ids[last:]), len(ids) - last
        return rows.array[count - 1] if want_logits else np.empty(0, np.float32)

    def read(self, ids: Sequence[int], sequence: int = 0) -> Logits:
        """Read tokens; returns the logits of all of them, f32[T,V]. The prompt graph has no logits: it reads what comes before each token
        anew, and a step reads the token. For measuring, not for reading prompts."""
        self._check_room(sequence, len(ids))
        memory, rows = self._sequences[sequence], []
        for start in range(0, len(ids), self.chunk):
            part, mark = ids[start : start + self.chunk], self.mark(sequence)
            for row, token in enumerate(part):
                self.rewind(mark, sequence)
                if row:
                    self._read(memory, PROMPT, part[:row])
                rows.append(self._read(memory, STEP, [token]).array[0].copy())
        return np.stack(rows)

    def step_rows(self, tokens: Sequence[int]) -> Rows:
        for sequence in range(self.batch):
            self._check_room(sequence, 1)
        if self.batch == 1:
            return self._read(self._sequences[0], STEP, tokens)
        # The sequences share the buffer of the logits.
        pairs = zip(self._sequences, tokens, strict=True)
        return Rows.of(np.stack([self._read(memory, STEP, [token]).array[0] for memory, token in pairs]))

    def _verify(self, tokens: Sequence[int], sequence: int) -> Rows:
        memory = self._sequences[sequence]
        rows = self._one_call(memory, STEP, tokens, 0)
        self._advance(memory, STEP, tokens)
        memory.accepted = len(tokens)
        return rows

    def _accept(self, count: int, sequence: int) -> None:
        self._sequences[sequence].accepted = count

    @property
    def busy_s(self) -> float:
        return sum(graph.session.busy_s for graph in self._graphs.values())

    def mark(self, sequence: int = 0) -> Mark:
        memory = self._sequences[sequence]
        self._settle(memory)
        return Mark(self.tokens(sequence), {name: memory.now(name).read() for name in memory.fixed})

    def _load(self, mark: Mark, sequence: int) -> None:
        memory = self._sequences[sequence]
        for name in memory.fixed:
            buffer = memory.now(name)
            buffer.write(mark.states.get(name, np.zeros(buffer.nbytes, np.uint8)))
        memory.accepted = 0

    def snapshot(self, sequence: int = 0) -> Snapshot:
        mark, memory = self.mark(sequence), self._sequences[sequence]
        used = len(memory.tokens)
        return Snapshot(mark, {name: np.ascontiguousarray(memory.cache_rows(name)[:, :used]) for name in memory.caches})

    def _load_caches(self, snapshot: Snapshot, sequence: int) -> None:
        memory, length = self._sequences[sequence], len(snapshot.mark.tokens)
        for name in memory.caches:
            rows = memory.cache_rows(name)
            rows[:, :length] = snapshot.caches[name]
            memory.now(name).write(rows.reshape(-1))

    def _read(self, memory: _Sequence, graph: str, ids: Sequence[int]) -> Rows:
        """Read and commit tokens in one call; their logits, none from the prompt graph."""
        rows = self._one_call(memory, graph, ids, len(ids))
        self._advance(memory, graph, ids)
        return rows

    def _settle(self, memory: _Sequence) -> None:
        """Take accepted tokens into the state: a step without tokens of its own."""
        if memory.accepted:
            self._one_call(memory, STEP, [], 0)
            self._advance(memory, STEP, [])

    def _one_call(self, memory: _Sequence, graph: str, ids: Sequence[int], commit: int) -> Rows:
        """One call, which does not yet change what is current. The logits have a row per token that the graph takes."""
        used = self._graphs[graph]
        call = memory.call(graph)
        padded = np.zeros((1, used.T), np.int64)
        padded[0, : len(ids)] = ids
        # The accepted tokens of the last verify are in `tokens` and in the caches; pending for the recurrent states only.
        values: dict[str, npt.NDArray[Any]] = {
            "input_ids": padded,
            "length": np.array([len(memory.tokens)], np.int32),
            "accepted": np.array([memory.accepted], np.int32),
            "commit": np.array([commit], np.int32),
        }
        for name, buffer in used.controls.items():
            buffer.write(as_bytes(values[name]))
        call.run()
        return used.logits.rows() if used.logits is not None else Rows.of(np.empty((0, 0), np.float32))

    def _advance(self, memory: _Sequence, graph: str, ids: Sequence[int]) -> None:
        """After a call of the graph: its results are current, and `ids` are read."""
        memory.exchange(self._graphs[graph])
        memory.tokens.extend(ids)
        memory.accepted = 0

    def _rows(self, session: Session, name: str) -> Buffer:
        """A rotary table for all slots of the graphs."""
        (spec,) = (spec for spec in session.spec.inputs if spec.name == name)
        shape, contents = rotary_table(self.manifest, name, int(spec.shape[0]), spec.dtype)
        buffer = session.buffer(spec.dtype, shape)
        buffer.write(contents)
        return buffer


def _shape(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(int(d) for d in shape)


class _Graph:
    """A session with the buffers that all sequences share: controls, logits, and outputs that nothing reads."""

    def __init__(self, session: Session) -> None:
        self.session, spec = session, session.spec
        self.spec: GraphSpec = spec
        buffer = session.buffer
        states = {state.name for state in spec.states}
        after = {state.after for state in spec.states}
        self.controls = {
            t.name: buffer(t.dtype, _shape(t.shape)) for t in spec.inputs if t.name not in states and t.name not in ("cos", "sin")
        }
        self.results = {t.name: buffer(t.dtype, _shape(t.shape)) for t in spec.outputs if t.name not in after}
        logits = self.results.get("logits")
        self.logits = LogitsBuffers(logits, self.results.get(TOP_LOGITS), self.results.get(TOP_IDS)) if logits is not None else None
        self.T = self.controls["input_ids"].shape[1]


class _Sequence:
    """What one sequence has read, and where its states are."""

    def __init__(self, graphs: Mapping[str, _Graph], tables: Mapping[str, Buffer], tokens: list[int]) -> None:
        self.tokens, self.accepted = tokens, 0
        self._graphs, self._tables = graphs, tables
        buffer = graphs[STEP].session.buffer
        specs = {state.name: state for graph in graphs.values() for state in graph.spec.states}
        copied = {state.name for graph in graphs.values() for state in graph.spec.states if not state.in_place}
        self._buffers = {
            name: [buffer(spec.dtype, _shape(spec.shape)) for _ in range(1 + (name in copied))] for name, spec in specs.items()
        }
        self._current = dict.fromkeys(specs, 0)
        self._calls: dict[tuple[str, tuple[int, ...]], Call] = {}
        self.caches = [name for name, spec in specs.items() if spec.grows]
        # Pending tensors need no remembering: they count only between a verify and the call after it.
        self.fixed = [name for name, spec in specs.items() if not spec.grows and not spec.pending]

    def now(self, name: str) -> Buffer:
        return self._buffers[name][self._current[name]]

    def cache_rows(self, name: str) -> npt.NDArray[np.uint8]:
        """A copy of a cache [1,Hkv,S,D] as bytes [Hkv,S,D * element size]."""
        buffer = self.now(name)
        heads, slots = buffer.shape[1:3]
        return buffer.read().reshape(heads, slots, buffer.nbytes // prod((heads, slots)))

    def call(self, graph: str) -> Call:
        """The bindings for the buffers that are current."""
        key = (graph, tuple(self._current.values()))
        if key not in self._calls:
            self._calls[key] = self._bind(self._graphs[graph])
        return self._calls[key]

    def _bind(self, graph: _Graph) -> Call:
        call, states = graph.session.call(repeated=False), {state.after: state for state in graph.spec.states}
        inputs = {**self._tables, **graph.controls, **{state.name: self.now(state.name) for state in graph.spec.states}}
        for tensor in graph.spec.inputs:
            call.bind_input(tensor.name, inputs[tensor.name])
        for tensor in graph.spec.outputs:
            state = states.get(tensor.name)
            if state is None:
                call.bind_output(tensor.name, graph.results[tensor.name])
            else:
                pair, at = self._buffers[state.name], self._current[state.name]
                call.bind_output(tensor.name, pair[at] if state.in_place else pair[1 - at])
        return call

    def exchange(self, graph: _Graph) -> None:
        """After a call of the graph: what it left is current."""
        for state in graph.spec.states:
            if not state.in_place:
                self._current[state.name] = 1 - self._current[state.name]
