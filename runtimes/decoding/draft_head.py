"""The draft head beside a decoder: it keeps its own attention cache in step with what the decoder has read, and drafts from there. Like
decoders, heads exist for graphs with dynamic and with fixed shapes; what is here is the bookkeeping of both.

Row i of the head pairs token i+1 with the decoder's hidden state of token i. So after n tokens the head can have n-1 rows, and the last
hidden state waits for the token that follows. Hidden states wait in a log: of a prompt chunk, of a verified draft, or of plain steps
that nobody drafted after; they are read in one call when somebody drafts or the log is full.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.logit_rows import Row
from qwen_export.runtimes.memory.buffers import Buffer, Bytes

WAITING = 256
"""Plain steps whose hidden states wait, beside those of one prompt chunk: so few calls that a stream without drafts does not notice."""


class DraftHead(ABC):
    """The head of one sequence. `log` [rows,H] is memory for hidden states that wait; `length`: rows that the head's cache holds of the
    text that the decoder has read."""

    def __init__(self, decoder: Decoder, log: Buffer) -> None:
        self._reader, self._log = decoder, log
        self.length = 0
        self._base = 0
        """The position whose hidden state is the log's first row; the last row is that of the last token read."""
        self.binding_s = 0.0
        """Seconds spent on bindings, and on recording them."""

    @property
    @abstractmethod
    def busy_s(self) -> float:
        """Seconds that the backend has worked for this head."""

    # ---- what the decoder tells ----

    def reserve(self, count: int) -> None:
        """Make room for the hidden states of `count` more tokens."""
        if self._known() - self._base + count > self._log.shape[0]:
            self.catch_up()
            keep = max(0, self._known() - 1)
            waiting = self._known() - keep
            if keep > self._base:
                row = self._log.row_bytes
                self._log.copy_from(self._log, 0, (keep - self._base) * row, waiting * row)
            self._base = keep

    def append(self, hidden: Buffer, count: int) -> None:
        """The decoder has read `count` tokens, of which `hidden` [.., H] has the states."""
        row = self._log.row_bytes
        self._log.copy_from(hidden, (self._known() - count - self._base) * row, 0, count * row)

    def cut(self) -> None:
        """The decoder has forgotten tokens that it verified just now."""
        self.length = min(self.length, max(0, self._known() - 1))

    def save(self) -> Bytes:
        """Bring the cache up to date and return the state that waits for its token, empty at the start."""
        self.catch_up()
        known, row = self._known(), self._log.row_bytes
        return self._log.read((known - 1 - self._base) * row, row) if known else np.zeros(0, np.uint8)

    def load(self, waiting: Bytes) -> None:
        """The decoder went back to where `save` was called."""
        self._base = self.length = max(0, self._known() - 1)
        self._log.write(waiting)

    # ---- reading and drafting ----

    def catch_up(self) -> None:
        """Read every row whose token is known."""
        while self.length < self._known() - 1:
            self._read(self._reader.tokens_from(self.length + 1)[: self._reader.chunk], rows=0)

    def first(self, token: int) -> Row:
        """The draft after `token`, which follows the text read: logits of draft_vocab tokens, valid until the next call."""
        if self.behind > self._reader.widest_verify:
            self.catch_up()
        return self._read([*self._reader.tokens_from(self.length + 1), token], rows=1)

    @abstractmethod
    def following(self, token: int, depth: int) -> Row:
        """The draft after the draft `token`, the `depth`-th of its round (1 is the first)."""

    @property
    def behind(self) -> int:
        """Rows that a draft would have to read: one, what a round accepted, or what plain steps have left."""
        return self._known() - self.length

    def _read(self, tokens: Sequence[int], rows: int) -> Row:
        made = self._read_rows(tokens, self.length - self._base, rows)
        self.length += len(tokens)
        return made

    @abstractmethod
    def _read_rows(self, tokens: Sequence[int], first: int, rows: int) -> Row:
        """Rows `length`.. from these tokens and the log's states `first`..; logits of the last `rows`, 0 or 1."""

    def _known(self) -> int:
        return self._reader.lengths[0]
