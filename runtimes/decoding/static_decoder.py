"""The decoder over graphs of fixed shapes (`static_graphs.py` lists them).

A call with fewer real tokens is padded; `commit` is how many are real, and the others leave no trace. Only `verify` takes in
tokens that the call before left open: after a verify, the next call goes through it, whatever its size. Slots have memory of their own and
take turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qwen_export.bundle_contract import FEATURES
from qwen_export.errors import ParameterError
from qwen_export.manifest import Manifest
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.decoding.decoder import Decoder, Logits
from qwen_export.runtimes.decoding.logit_rows import Rows
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.decoding.rotary_tables import RotaryTables
from qwen_export.runtimes.decoding.sequence import Change
from qwen_export.runtimes.decoding.snapshot import CachePiece, Mark
from qwen_export.runtimes.decoding.static_draft_head import StaticDraftHead
from qwen_export.runtimes.decoding.static_graphs import DECODER_GRAPHS, HEAD_GRAPHS, PROMPT, STEP, VERIFY, StaticGraph, StaticStates
from qwen_export.runtimes.memory.buffers import Bytes
from qwen_export.runtimes.memory.copies import Kept, on_host

_HEAD = "mtp."


class StaticDecoder(Decoder):
    """`batch` slots over the graphs of a bundle, by name in `sessions`, each with room for `capacity` tokens. With `drafts` a draft head
    keeps up with them, where its graphs are among those."""

    limit = ("what the bundle was built for", "Lower {max_context}, or build with a larger one.")
    no_verify = ("the bundle was built for steps of one token", "Build it again with a larger {step_tokens}.")
    head: StaticDraftHead | None

    def __init__(
        self, sessions: Mapping[str, Session], manifest: Manifest, batch: int = 1, capacity: int | None = None, *, drafts: bool = False
    ) -> None:
        super().__init__(manifest, batch, capacity, manifest.max_context)
        self._graphs = {name: StaticGraph(sessions[name]) for name in DECODER_GRAPHS if name in sessions}
        self.chunk = self._graphs[PROMPT].T
        self.widest_verify = self._graphs[VERIFY].T if VERIFY in self._graphs else 0
        self.logit_tokens = max(1, self.widest_verify)
        prompt = sessions[PROMPT]
        self._on_host = prompt.device.is_host
        rows = next(int(spec.shape[0]) for spec in prompt.spec.inputs if spec.name == "cos")
        self.tables = RotaryTables(manifest, prompt.spec.inputs, prompt.buffer, rows)
        self.tables.fill(rows)
        self._states = [StaticStates(self._graphs) for _ in range(batch)]
        self._accepted = [0] * batch
        self.sees = any(spec.name == FEATURES for spec in prompt.spec.inputs)
        head = {name: sessions[name] for name in HEAD_GRAPHS if name in sessions}
        self.head = StaticDraftHead(head, self, self.tables) if drafts and head else None

    def parts(self, count: int, slot: int = 0, chunk: int | None = None, *, want_logits: bool = True) -> list[tuple[int, int, int]]:
        """See Decoder. The prompt graph has no logits: the last token is read by a step, unless a verify can read all."""
        parts = super().parts(count, slot, chunk, want_logits=want_logits)
        start, stop, logits = parts[-1]
        if logits and stop - start > max(1, self.widest_verify):
            parts[-1:] = [(start, stop - 1, 0), (stop - 1, stop, 1)]
        return parts

    def read(self, ids: Sequence[int], slot: int = 0) -> Logits:
        """Read tokens; returns the logits of all of them, f32[T,V]. The prompt graph has no logits: it reads what comes before each token
        again, and a step reads the token. For measuring, not for reading prompts."""
        self.parts(len(ids), slot)
        rows = []
        for start in range(0, len(ids), self.chunk):
            part, mark = ids[start : start + self.chunk], self.mark(slot)
            for row, token in enumerate(part):
                self.rewind(mark, slot)
                if row:
                    self.run([Read(slot, part[:row], logits=0)])
                rows.append(self.run([Read(slot, [token])])[0].array[0].copy())
        return np.stack(rows)

    def _check(self, reads: Sequence[Read]) -> None:
        super()._check(reads)
        for read in reads:
            if read.commit and read.logits and len(read.ids) > max(1, self.widest_verify):
                raise ParameterError(
                    "the graphs of this bundle have no logits for so many tokens",
                    parameter="logits",
                    got=f"{read.logits} rows of {len(read.ids)} tokens",
                    expected=f"logits of reads of at most {max(1, self.widest_verify)} tokens",
                    fix="Read all but the last token without logits first, as prefill() does.",
                )

    def _run(self, reads: Sequence[Read]) -> list[Rows]:
        if len(reads) == 1:
            return [self._read(reads[0])]
        # Calls of a graph share the memory of its logits: the rows are copied.
        return [Rows.of(self._read(read).array[: read.logits].copy()) for read in reads]

    def _read(self, read: Read) -> Rows:
        """The rows of a read: its last `logits` tokens."""
        slot, count = read.slot, len(read.ids)
        sequence = self.sequences[slot]
        with Change([sequence]):
            start = 0
            if count > max(1, self.widest_verify) and self._accepted[slot]:  # the prompt graph takes no open tokens in
                start = self.widest_verify
                self._call(slot, VERIFY, read, 0, start)
            while start < count:
                name = self._graph_for(slot, count - start, committed_prompt=read.commit and not read.logits)
                stop = min(count, start + self._graphs[name].T)
                rows = self._call(slot, name, read, start, stop)
                start = stop
        return rows.part(count - read.logits) if read.logits else Rows.none()

    def _graph_for(self, slot: int, count: int, *, committed_prompt: bool) -> str:
        """The graph that reads the next of `count` tokens."""
        if count == 1 and not self._accepted[slot]:
            return STEP
        if committed_prompt and not self._accepted[slot]:
            return PROMPT
        return VERIFY if self.widest_verify else PROMPT

    def _call(self, slot: int, name: str, read: Read, start: int, stop: int) -> Rows:
        """One call, with tokens `start` .. `stop - 1` of a read: logits of those and of what pads them, none from the prompt graph, valid
        until the graph's next call."""
        graph, sequence, ids, count = self._graphs[name], self.sequences[slot], read.ids[start:stop], stop - start
        if self.head is not None:
            self.head.reserve(slot, count)
        if read.positions is not None or self.tables.own(slot):
            self.tables.place(slot, sequence.length, read.positions[start:stop] if read.positions is not None else None, count)
        # The accepted tokens of the last verify are in the sequence and in the caches; pending for the recurrent states only.
        graph.set(
            input_ids=graph.padded(ids),
            length=[sequence.length],
            accepted=[self._accepted[slot]],
            commit=[count if read.commit else 0],
        )
        self._place(graph, slot, read, start, stop)
        self._states[slot].run(name, self.tables.of(slot))
        if self.observer is not None:
            self.observer(sequence.length, count, graph.results)
        sequence.extend(ids, read.media if stop == len(read.ids) else (), commit=read.commit)
        self._accepted[slot] = 0 if read.commit else count
        if self.head is not None:
            self.head.append(slot, graph.results["hidden"], 0, count)
        return graph.logits()

    def _place(self, graph: StaticGraph, slot: int, read: Read, start: int, stop: int) -> None:
        """What pictures have for tokens `start` .. `stop - 1` of a read, for the graph and the draft head."""
        chosen = [i for i, place in enumerate(read.places) if start <= place < stop]
        places = [read.places[i] - start for i in chosen]
        if read.features is None or not chosen:
            graph.place((), ())
            return
        features = read.features[chosen]
        graph.place(list(features), places)
        if self.head is not None:
            self.head.see(slot, self.sequences[slot].length, features, places)

    def _accept(self, count: int, slot: int) -> None:
        self._accepted[slot] = count

    def prepare(self, count: int) -> None:
        """See Decoder; before a verify the draft head reads what plain steps have left it."""
        if count > 1 and self.head is not None:
            self.head.prepare_round()
        if self.batch == 1 and count <= max(1, self.widest_verify):
            self._prepare(STEP if count == 1 and not self._accepted[0] else VERIFY)

    def warm(self, drafts: int | None = None) -> None:
        """See Decoder: for the graphs of all calls."""
        for name in self._graphs:
            self._prepare(name, every=True)
        if self.head is not None:
            self.head.prepare()

    def _prepare(self, name: str, *, every: bool = False) -> None:
        """Calls of a graph, all of whose tokens are padding."""
        graph, states = self._graphs[name], self._states[0]
        if every or not states.prepared(name):
            graph.set(input_ids=graph.padded([]), length=[self.sequences[0].length], accepted=[0], commit=[0])
            states.prepare(name, self.tables.of(0), every=every)

    @property
    def busy_s(self) -> float:
        return sum(graph.session.busy_s for graph in self._graphs.values()) + (self.head.busy_s if self.head is not None else 0.0)

    @property
    def binding_s(self) -> float:
        return sum(graph.session.binding_s for graph in self._graphs.values()) + (self.head.prepared_s if self.head is not None else 0.0)

    @property
    def fixed_bytes(self) -> int:
        rows = 0 if self._on_host else self.growing_bytes(1) * self.longest
        return self.batch * (self._states[0].fixed_bytes + rows)

    @property
    def on_gpu(self) -> bool:
        return not self._on_host

    def growing_bytes(self, length: int) -> int:
        return sum(states.row_bytes(cache) for states, cache in self._caches(0).values()) * length if self._on_host else 0

    # ---- states ----

    def mark(self, slot: int = 0, *, on_device: bool = False) -> Mark:
        sequence = self._sequence(slot)
        sequence.require_settled(slot)
        if self._accepted[slot]:  # into the state: a call without tokens of its own
            with Change([sequence]):
                self._call(slot, VERIFY, Read(slot, (), logits=0), 0, 0)
        return super().mark(slot, on_device=on_device)

    def _mark(self, slot: int, waiting: Bytes, on_device: bool) -> Mark:
        states, sequence = self._states[slot], self.sequences[slot]
        return Mark(
            tuple(sequence.tokens),
            {name: states.now(name).read() for name in states.fixed},
            waiting=waiting,
            media=sequence.media,
            positions=self.tables.positions(slot, sequence.length),
        )

    def _load(self, mark: Mark, slot: int) -> None:
        states = self._states[slot]
        for name in states.fixed:
            buffer = states.now(name)
            buffer.write(on_host(mark.states.get(name, np.zeros(buffer.nbytes, np.uint8))))
        self._accepted[slot] = 0
        self.tables.restore(slot, mark.positions)

    def _save_caches(self, slot: int, start: int, on_device: bool) -> dict[str, Kept]:
        used = self.sequences[slot].length
        return {name: states.rows(cache, start, used) for name, (states, cache) in self._caches(slot).items()}

    def _load_caches(self, piece: CachePiece, slot: int) -> None:
        for name, (states, cache) in self._caches(slot).items():
            states.set_rows(cache, piece.start, on_host(piece.rows[name]))

    def _cache_names(self) -> list[str]:
        return list(self._caches(0))

    def _caches(self, slot: int) -> dict[str, tuple[StaticStates, str]]:
        """Where each attention cache is, the draft head's among them."""
        places = {name: (self._states[slot], name) for name in self._states[slot].caches}
        if self.head is not None:
            states = self.head.states[slot]
            places |= {f"{_HEAD}{name}": (states, name) for name in states.caches}
        return places
