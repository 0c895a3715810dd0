"""The draft head beside a decoder: it keeps its own attention cache in step with what the decoder has read, and drafts from there.

Row i of the head pairs token i+1 with the decoder's hidden state of token i. So after n tokens the head can have n-1 rows, and the last
hidden state waits for the token that follows. Hidden states wait in a log: of a prompt chunk, of a verified draft, or of plain steps
that nobody drafted after; they are read in one call when somebody drafts or the log is full.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qwen_export.runtimes.bound_call import BoundCall
from qwen_export.runtimes.buffers import BUFFERS, Buffer, Bytes, CudaBuffer
from qwen_export.runtimes.logits import Row
from qwen_export.runtimes.onnxruntime_session import Session

if TYPE_CHECKING:
    from qwen_export.runtimes.dynamic_decoder import DynamicDecoder

# Plain steps whose hidden states wait, beside those of one prompt chunk: so few calls that a stream without drafts does not notice.
_WAITING = 256
_SLOT_AXIS = 2


class DraftHead:
    """The head of one sequence. `length`: rows that its cache holds of the text that the decoder has read."""

    def __init__(self, session: Session, decoder: DynamicDecoder) -> None:
        self.session, self._decoder = session, decoder
        kind = BUFFERS[session.device]
        spec = next(tensor for tensor in session.spec.inputs if tensor.name == "hidden")
        self._width, dtype = int(spec.shape[-1]), spec.dtype
        self._rows = decoder.chunk + _WAITING
        # What waits, what a call reads, what it leaves.
        self._log, self._input, self._output = (kind(dtype, (self._rows, self._width)) for _ in range(3))
        self._row_bytes = self._log.row_bytes
        self.caches: dict[str, Buffer] = {
            s.name: kind(s.dtype, tuple(d if isinstance(d, int) else {"B": 1, "S": decoder.slots}[d] for d in s.shape))
            for s in session.spec.states
        }
        self.length = 0
        self._base = 0
        """The position whose hidden state is the log's first row; the last row is that of the last token read."""
        self._calls: dict[tuple[int, int], BoundCall] = {}
        self.binding_s = 0.0
        """Seconds spent on bindings, and on recording them."""

    # ---- what the decoder tells ----

    def reserve(self, count: int) -> None:
        """Make room for the hidden states of `count` more tokens."""
        if self._known() - self._base + count > self._rows:
            self.catch_up()
            keep = max(0, self._known() - 1)
            waiting = self._known() - keep
            if keep > self._base:
                self._log.copy_from(self._log, 0, (keep - self._base) * self._row_bytes, waiting * self._row_bytes)
            self._base = keep

    def append(self, hidden: Buffer, count: int) -> None:
        """The decoder has read `count` tokens, of which `hidden` [.., H] has the states."""
        self._log.copy_from(hidden, (self._known() - count - self._base) * self._row_bytes, 0, count * self._row_bytes)

    def cut(self) -> None:
        """The decoder has forgotten tokens that it verified just now."""
        self.length = min(self.length, max(0, self._known() - 1))

    def save(self) -> Bytes:
        """Bring the cache up to date and return the state that waits for its token, empty at the start."""
        self.catch_up()
        known = self._known()
        return self._log.read((known - 1 - self._base) * self._row_bytes, self._row_bytes) if known else np.zeros(0, np.uint8)

    def load(self, waiting: Bytes) -> None:
        """The decoder went back to where `save` was called."""
        self._base = self.length = max(0, self._known() - 1)
        self._log.write(waiting)

    def grow(self, slots: int) -> None:
        for name, buffer in self.caches.items():
            if not isinstance(buffer, CudaBuffer):
                raise AssertionError("host caches have their full size from the start")
            self.caches[name] = buffer.grown(_SLOT_AXIS, slots, self.length)
        self._calls.clear()

    # ---- reading and drafting ----

    def catch_up(self) -> None:
        """Read every row whose token is known."""
        if self.length < self._known() - 1:
            self._read(self._decoder.tokens_from(self.length + 1), rows=0)

    def first(self, token: int) -> Row:
        """The draft after `token`, which follows the text read: logits of draft_vocab tokens, valid until the next call."""
        if self.behind > self._decoder.widest_verify:
            self.catch_up()
        return self._read([*self._decoder.tokens_from(self.length + 1), token], rows=1)

    def following(self, token: int, depth: int) -> Row:
        """The draft after the draft `token`, the `depth`-th of its round (1 is the first)."""
        return self._run(np.array([[token]], np.int64), self.length + depth - 1, rows=1)

    def _read(self, tokens: list[int], rows: int) -> Row:
        start = (self.length - self._base) * self._row_bytes
        self._input.copy_from(self._log, 0, start, len(tokens) * self._row_bytes)
        made = self._run(np.array([tokens], np.int64), self.length, rows)
        self.length += len(tokens)
        return made

    def _run(self, ids: npt.NDArray[np.int64], position: int, rows: int) -> Row:
        """One call over the states in `_input`; its last own state becomes the input of a following draft."""
        T = ids.shape[1]
        call = self._calls.get((T, rows)) or self._bind(T, rows)
        made = call.run(ids, np.array([position], np.int32))
        if rows:
            self._input.copy_from(self._output, 0, (T - 1) * self._row_bytes, self._row_bytes)
        return made[0]

    def _bind(self, T: int, rows: int) -> BoundCall:
        """Calls that draft come again: after one token, or after what a round accepted. Those that only catch up have odd sizes."""
        started = time.perf_counter()
        caches = {name: buffer.address for name, buffer in self.caches.items()}
        inputs = {
            **caches,
            **{name: table.address for name, table in self._decoder.tables.items()},
            "hidden": self._input.address,
        }
        outputs = {state.after: caches[state.name] for state in self.session.spec.states} | {"hidden_out": self._output.address}
        dims = {"B": 1, "T": T, "N": rows, "S": self._decoder.slots}
        call = BoundCall(self.session, dims, inputs, outputs, repeated=rows > 0)
        if rows:
            self._calls[T, rows] = call
        if call.recorded:
            # Recording runs the graph; what it writes, the real run behind it writes again.
            call.run(np.zeros((1, T), np.int64), np.array([self.length], np.int32))
        self.binding_s += time.perf_counter() - started
        return call

    @property
    def behind(self) -> int:
        """Rows that a draft would have to read: one, what a round accepted, or what plain steps have left."""
        return self._known() - self.length

    def _known(self) -> int:
        return self._decoder.lengths[0]
