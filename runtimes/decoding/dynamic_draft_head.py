"""The draft head over one graph with dynamic shapes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qwen_export.runtimes.backends.onnxruntime.onnxruntime_session import Session
from qwen_export.runtimes.decoding.bound_call import BoundCall, LogitsMemory
from qwen_export.runtimes.decoding.draft_head import WAITING, DraftHead
from qwen_export.runtimes.decoding.logit_rows import Row, Rows
from qwen_export.runtimes.memory.buffers import BUFFERS, Buffer, CudaBuffer

if TYPE_CHECKING:
    from qwen_export.runtimes.decoding.dynamic_decoder import DynamicDecoder

_SLOT_AXIS = 2
# Rows are caught up with in calls of these sizes: on CUDA the first call of any other size costs some 50 ms, these are recorded once.
_BLOCKS: dict[str, tuple[int, ...]] = {"cuda": (512, 64, 8, 1)}


class DynamicDraftHead(DraftHead):
    def __init__(self, session: Session, decoder: DynamicDecoder) -> None:
        self.session, self._decoder = session, decoder
        kind = BUFFERS[session.device]
        spec = next(tensor for tensor in session.spec.inputs if tensor.name == "hidden")
        shape = (decoder.chunk + WAITING, int(spec.shape[-1]))
        super().__init__(decoder, kind(spec.dtype, shape))
        # What a call reads, what it leaves.
        self._input, self._output = kind(spec.dtype, shape), kind(spec.dtype, shape)
        self.caches: dict[str, Buffer] = {
            s.name: kind(s.dtype, tuple(d if isinstance(d, int) else {"B": 1, "S": decoder.slots}[d] for d in s.shape))
            for s in session.spec.states
        }
        self._logits = LogitsMemory(session, 1)
        self._calls: dict[tuple[int, int], BoundCall] = {}
        self._blocks = _BLOCKS.get(session.device, ())

    @property
    def busy_s(self) -> float:
        return self.session.busy_s

    def prepare(self, longest: int = 1) -> None:
        """Make what drafts after up to `longest` tokens need. Between drafts; what the calls leave is not read."""
        for T in range(1, longest + 1):
            if (T, 1) not in self._calls:
                self._bind(T, 1)

    def grow(self, slots: int) -> None:
        for name, buffer in self.caches.items():
            if not isinstance(buffer, CudaBuffer):
                raise AssertionError("host caches have their full size from the start")
            self.caches[name] = buffer.grown(_SLOT_AXIS, slots, self.length)
        self._calls.clear()

    def following(self, token: int, depth: int) -> Row:
        return self._run([token], self.length + depth - 1, rows=1)

    def _read_rows(self, tokens: Sequence[int], first: int, rows: int) -> Row:
        row, made, start = self._log.row_bytes, Rows.none()[0], 0
        for size in self._parts(len(tokens), rows):
            self._input.copy_from(self._log, 0, (first + start) * row, size * row)
            made = self._run(tokens[start : start + size], self.length + start, rows)
            start += size
        return made

    def _parts(self, count: int, rows: int) -> Iterator[int]:
        """Sizes of the calls that read so many rows."""
        for size in self._blocks if not rows else ():
            while count >= size:
                yield size
                count -= size
        if count:
            yield count

    def _run(self, ids: Sequence[int], position: int, rows: int) -> Row:
        """One call over the states in `_input`; its last own state becomes the input of a following draft."""
        T = len(ids)
        call = self._calls.get((T, rows)) or self._bind(T, rows)
        made = call.run(ids, [position])
        if rows:
            self._input.copy_from(self._output, 0, (T - 1) * self._output.row_bytes, self._output.row_bytes)
        return made[0]

    def _bind(self, T: int, rows: int) -> BoundCall:
        """Calls that draft come again: after one token, or after what a round accepted. So do blocks; other calls have odd sizes."""
        started, busy = time.perf_counter(), self.session.busy_s
        caches = {name: buffer.address for name, buffer in self.caches.items()}
        inputs = {
            **caches,
            **{name: table.address for name, table in self._decoder.tables.items()},
            "hidden": self._input.address,
        }
        outputs = {state.after: caches[state.name] for state in self.session.spec.states} | {"hidden_out": self._output.address}
        dims = {"B": 1, "T": T, "N": rows, "S": self._decoder.slots}
        call = BoundCall(self.session, dims, inputs, outputs, self._logits, repeated=rows > 0 or T in self._blocks)
        if rows or T in self._blocks:
            self._calls[T, rows] = call
        if call.recorded:
            # Recording runs the graph; what it writes, the real run behind it writes again.
            call.run([0] * T, [self.length])
        self.session.busy_s = busy  # counted once, as time spent on bindings
        self.binding_s += time.perf_counter() - started
        return call
