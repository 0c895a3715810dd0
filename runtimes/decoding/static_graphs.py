"""The graphs of a bundle with fixed shapes (`bundle_contract.py` has the table), and the memory of one sequence that they work on. A call
with fewer tokens is padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import numpy as np
import numpy.typing as npt

from qwen_export.bundle_contract import DECODER_GRAPHS as DECODER_GRAPHS
from qwen_export.bundle_contract import FEATURES, PLACES
from qwen_export.bundle_contract import HEAD_GRAPHS as HEAD_GRAPHS
from qwen_export.bundle_contract import HEAD_PROMPT as HEAD_PROMPT
from qwen_export.bundle_contract import HEAD_STEP as HEAD_STEP
from qwen_export.bundle_contract import HEAD_VERIFY as HEAD_VERIFY
from qwen_export.bundle_contract import PROMPT as PROMPT
from qwen_export.bundle_contract import STEP as STEP
from qwen_export.bundle_contract import VERIFY as VERIFY
from qwen_export.manifest import READ_AGAIN, Manifest
from qwen_export.runtimes.backends.session import Call, Session
from qwen_export.runtimes.decoding.features_memory import PlacedFeatures
from qwen_export.runtimes.decoding.logit_rows import TOP_IDS, TOP_LOGITS, LogitsBuffers, Rows
from qwen_export.runtimes.decoding.rotary_tables import TABLES
from qwen_export.runtimes.memory.buffers import Buffer


def is_static(manifest: Manifest) -> bool:
    return PROMPT in manifest.graphs


class StaticGraph:
    """A session with the buffers that all sequences share: controls, logits, and outputs that nothing reads. `T`: tokens of a call."""

    def __init__(self, session: Session) -> None:
        self.session, self.spec = session, session.spec
        buffer, states = session.buffer, {state.name + also for state in session.spec.states for also in ("", READ_AGAIN)}
        after = {state.after for state in session.spec.states}
        self.controls = {
            t.name: buffer(t.dtype, fixed(t.shape)) for t in session.spec.inputs if t.name not in states and t.name not in TABLES
        }
        self.results = {t.name: buffer(t.dtype, fixed(t.shape)) for t in session.spec.outputs if t.name not in after}
        self.T = self.controls["input_ids"].shape[1]
        results = self.results
        self._pictures = PlacedFeatures(self.controls[FEATURES], self.controls[PLACES]) if FEATURES in self.controls else None
        self._logits = LogitsBuffers(results["logits"], results.get(TOP_LOGITS), results.get(TOP_IDS)) if "logits" in results else None

    def set(self, **values: Sequence[int]) -> None:
        """Write those of the controls that the graph has."""
        for name, value in values.items():
            if name in self.controls:
                self.controls[name].write_ints(value)

    def place(self, features: Sequence[npt.NDArray[np.generic]], places: Sequence[int]) -> None:
        """What stands for the tokens at `places` of the next call instead of their embeddings, a row for each; none for a call of text."""
        if self._pictures is not None:
            self._pictures.place(features, places)

    def padded(self, ids: Sequence[int]) -> list[int]:
        """As many token ids as the graph takes."""
        return [*ids, *[0] * (self.T - len(ids))]

    def logits(self) -> Rows:
        """Those of the last call, none from a graph without."""
        return self._logits.rows() if self._logits is not None else Rows.none()


_Key = tuple[str, tuple[int, ...], int]
"""A graph, which buffer of each of its states is current, and the identity of the rotary tables."""


class StaticStates:
    """States and caches of one sequence. Those that some graph does not write in place have two buffers, which change places after a
    call."""

    def __init__(self, graphs: Mapping[str, StaticGraph]) -> None:
        self._graphs = graphs
        buffer = next(iter(graphs.values())).session.buffer
        specs = {state.name: state for graph in graphs.values() for state in graph.spec.states}
        copied = {state.name for graph in graphs.values() for state in graph.spec.states if not state.in_place}
        self._buffers = {name: [buffer(spec.dtype, fixed(spec.shape)) for _ in range(1 + (name in copied))] for name, spec in specs.items()}
        self._current = dict.fromkeys(specs, 0)
        self._calls: dict[_Key, Call] = {}
        self._prepared: set[_Key] = set()
        self.caches = [name for name, spec in specs.items() if spec.grows]
        # Pending tensors need no remembering: they count only between a verify and the call after it.
        self.fixed = [name for name, spec in specs.items() if not spec.grows and not spec.pending]

    def now(self, name: str) -> Buffer:
        return self._buffers[name][self._current[name]]

    def run(self, name: str, tables: Mapping[str, Buffer]) -> None:
        """One call of a graph on what is current; what it leaves is current then. `tables`: cos and sin of the sequence."""
        graph = self._graphs[name]
        self._call(graph, self._key(graph, name, tables), tables).run()
        self._turn(state.name for state in graph.spec.states if not state.in_place)

    def prepare(self, name: str, tables: Mapping[str, Buffer], *, every: bool = False) -> None:
        """Prepare the coming calls of a graph: the one on what is current, and the one after it, which changes buffers back; with `every`
        also those after other graphs have changed some of the buffers. The graph's controls must commit nothing, and place cache rows
        after those in use; then what is current stays."""
        graph = self._graphs[name]
        turning = [state for state in graph.spec.states if not state.in_place]
        pending = [state.name for state in turning if state.pending]
        fixed = [state.name for state in turning if not state.pending]
        for turned in ([], [*fixed, *pending], *([fixed, pending] if every else [])):
            self._prepare(graph, name, turned, tables)

    def prepared(self, name: str) -> bool:
        """Whether the next call of a graph was prepared."""
        return any(key[:2] == self._key(self._graphs[name], name, {})[:2] for key in self._prepared)

    def _prepare(self, graph: StaticGraph, name: str, turned: Sequence[str], tables: Mapping[str, Buffer]) -> None:
        """One call, with these states in their other buffers. New states go to their buffers; theirs are in the others."""
        pairs = [(self._buffers[state][self._current[state]], self._buffers[state][1 - self._current[state]]) for state in turned]
        self._turn(turned)
        key = self._key(graph, name, tables)
        if key not in self._prepared:
            for now, other in pairs:
                other.copy_from(now, 0, 0, now.nbytes)
            self._call(graph, key, tables).prepare()
            self._prepared.add(key)
            for now, other in pairs:
                now.copy_from(other, 0, 0, now.nbytes)
        self._turn(turned)

    def _key(self, graph: StaticGraph, name: str, tables: Mapping[str, Buffer]) -> _Key:
        return name, tuple(self._current[state.name] for state in graph.spec.states), id(tables)

    def _call(self, graph: StaticGraph, key: _Key, tables: Mapping[str, Buffer]) -> Call:
        if key not in self._calls:
            self._calls[key] = self._bind(graph, tables)
        return self._calls[key]

    def _turn(self, names: Iterable[str]) -> None:
        """The other buffers of these states are the current ones."""
        for name in names:
            self._current[name] = 1 - self._current[name]

    def _bind(self, graph: StaticGraph, tables: Mapping[str, Buffer]) -> Call:
        call, states = graph.session.call(repeated=False), {state.after: state for state in graph.spec.states}
        inputs = {**tables, **graph.controls}
        inputs |= {state.name + also: self.now(state.name) for state in graph.spec.states for also in ("", READ_AGAIN)}
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

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the states, whatever the length of the text."""
        return sum(self.now(name).nbytes for name in self.fixed)

    def row_bytes(self, name: str) -> int:
        """Bytes that one token has in a cache."""
        heads, _, width = self._layout(name)
        return heads * width

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """A copy of slots `start` .. `stop - 1` of a cache [1,Hkv,S,D], as bytes [Hkv,slots,D * element size]."""
        buffer, (heads, slots, width) = self.now(name), self._layout(name)
        parts = [buffer.read((head * slots + start) * width, (stop - start) * width) for head in range(heads)]
        return np.stack(parts).reshape(heads, stop - start, width)

    def set_rows(self, name: str, start: int, rows: npt.NDArray[np.uint8]) -> None:
        """What `rows` gave, back into slots from `start` on."""
        buffer, (heads, slots, width) = self.now(name), self._layout(name)
        for head in range(heads):
            buffer.write(rows[head].reshape(-1), (head * slots + start) * width)

    def _layout(self, name: str) -> tuple[int, int, int]:
        """Heads and slots of a cache, and bytes of one slot of a head."""
        buffer = self.now(name)
        heads, slots = buffer.shape[1:3]
        return heads, slots, buffer.nbytes // prod((heads, slots))


def fixed(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(int(d) for d in shape)
