"""The draft head of a decoder: it keeps its own attention cache in step with what the decoder has read, and drafts from there. Like
decoders, heads exist for graphs with dynamic and with fixed shapes; here is the bookkeeping of both.

Row i of the head pairs token i+1 with the decoder's hidden state of token i. So after n tokens the head can have n-1 rows, and the last
hidden state waits for the token that follows. Hidden states wait in a log, one per slot: of a prompt chunk, of a verified draft, or of
plain steps without drafts; they are read in one call when a draft is needed or the log is full.

In steps of many sequences that draft nothing a head would cost more than it can bring: a copy for each sequence, and rows to read. Where
it does not follow (`follows`), a step leaves one copy of all its hidden states, and a sequence that drafts again goes on from the last of
its own: the head's row r then is that of token r + skipped. Drafts are worse for want of the rows between; the text is the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from qwen_export.errors import ParameterError
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.logit_rows import Row
from qwen_export.runtimes.memory.buffers import Buffer, Bytes

Feature = npt.NDArray[np.generic]
"""One row of the tower's results, [H]."""

WAITING = 256
"""Plain steps whose hidden states wait, besides those of one prompt chunk: so few calls that a stream without drafts is not slower."""


class DraftHead(ABC):
    """`log` [slots,rows,H] is memory for hidden states that wait, `latest` [slots,H] for those of a step that is not followed, None where
    every step is."""

    def __init__(self, decoder: Decoder, log: Buffer, latest: Buffer | None = None) -> None:
        self._reader, self._log, self._latest = decoder, log, latest
        self.follows = True
        """Whether the rows of steps are kept; those of prompts and verifies always are."""
        self._left: set[int] = set()
        """Slots whose last step was not followed."""
        slots, self._log_rows = log.shape[:2]
        self._row_bytes = log.row_bytes // self._log_rows
        self.slot_bytes = log.row_bytes
        """Bytes of a slot beside its cache."""
        self.lengths = [0] * slots
        """Rows that the head's cache holds of the text that the decoder has read, by slot."""
        self._skipped = [0] * slots
        """Rows of the text that were never read, by slot."""
        self._bases = [0] * slots
        """The position whose hidden state is the log's first row; the last row is that of the last token read."""
        self._seen: list[dict[int, Feature]] = [{} for _ in range(slots)]
        """What stands for tokens of pictures that the head has not read, by slot and position."""
        self.binding_s = 0.0
        """Seconds spent on bindings, and on recording them."""

    @property
    @abstractmethod
    def busy_s(self) -> float:
        """Seconds that the backend has worked for this head."""

    # ---- what the decoder reports ----

    @property
    def may_leave(self) -> bool:
        """Whether `follows` may be False."""
        return self._latest is not None

    def begin_step(self, slots: Sequence[int]) -> None:
        """These slots are about to read a token each."""
        for slot in slots if self.follows else ():
            self.reserve(slot, 1)

    def end_step(self, slots: range, hidden: Buffer) -> None:
        """They have; `hidden` [slots,H] has their states in this order."""
        if self.follows or self._latest is None:
            for place, slot in enumerate(slots):
                self.append(slot, hidden, place, 1)
        else:
            self._latest.copy_from(hidden, slots[0] * self._row_bytes, 0, len(slots) * self._row_bytes)
            self._left.update(slots)

    def _join(self, slot: int) -> None:
        """Go on from the last hidden state of a slot that was left."""
        if slot not in self._left or self._latest is None:
            return
        self._left.discard(slot)
        last = self._known(slot) - 1
        self._skipped[slot], self._bases[slot] = last - self.lengths[slot], last
        self._log.copy_from(self._latest, self._at(slot, 0), slot * self._row_bytes, self._row_bytes)
        self._seen[slot] = {at: row for at, row in self._seen[slot].items() if at > last}

    def reserve(self, slot: int, count: int) -> None:
        """Make room for the hidden states of `count` more tokens."""
        self._join(slot)
        known, base = self._known(slot), self._bases[slot]
        if known - base + count <= self._log_rows:
            return
        self.catch_up(slot)
        keep = max(0, known - 1)
        if keep > base:
            at, row = self._at(slot, 0), self._row_bytes
            self._log.copy_from(self._log, at, at + (keep - base) * row, (known - keep) * row)
        self._bases[slot] = keep

    def append(self, slot: int, hidden: Buffer, start: int, count: int) -> None:
        """The decoder has read `count` tokens in `slot`, of which `hidden` [.., H] has the states from row `start` on."""
        row = self._row_bytes
        self._log.copy_from(hidden, self._at(slot, self._known(slot) - count - self._bases[slot]), start * row, count * row)

    def see(self, slot: int, start: int, features: npt.NDArray[np.generic], places: Sequence[int]) -> None:
        """The decoder reads features of pictures as tokens `start` + `places` of the sequence: the head needs them, too."""
        self._seen[slot].update((start + place, row) for place, row in zip(places, features, strict=True))

    def cut(self, slot: int) -> None:
        self.lengths[slot] = min(self.lengths[slot], max(0, self._known(slot) - 1 - self._skipped[slot]))

    def save(self, slot: int) -> Bytes:
        """Bring the cache up to date and return the state that waits for its token, empty at the start."""
        self.catch_up(slot)
        known = self._known(slot)
        return self._log.read(self._at(slot, known - 1 - self._bases[slot]), self._row_bytes) if known else np.zeros(0, np.uint8)

    def load(self, slot: int, waiting: Bytes) -> None:
        self._seen[slot].clear()
        self._left.discard(slot)
        self._skipped[slot] = 0
        self._bases[slot] = self.lengths[slot] = max(0, self._known(slot) - 1)
        self._log.write(waiting, self._at(slot, 0))

    # ---- reading and drafting ----

    def catch_up(self, slot: int) -> None:
        """Read every row whose token is known."""
        self._join(slot)
        tokens = self._reader.sequences[slot].tokens
        while self._read_to(slot) < len(tokens) - 1:
            start = self._read_to(slot) + 1
            self._read(slot, tokens[start : start + self._reader.chunk], rows=0)

    def first(self, tokens: Mapping[int, int]) -> dict[int, Row]:
        """The draft after a token that follows the text read, by slot: logits of draft_vocab tokens, valid until the next call."""
        rows = {}
        for slot, token in tokens.items():
            if not self._known(slot):
                raise ParameterError(
                    "a draft follows a text, and the slot has none", parameter="tokens", got=f"slot {slot}", fix="Read a prompt first."
                )
            self._join(slot)
            if self.behind(slot) > self._reader.widest_verify:
                self.catch_up(slot)
            rows[slot] = [*self._reader.sequences[slot].tokens[self._read_to(slot) + 1 :], token]
        return self._first(rows)

    def _first(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        """Read these rows of each slot; logits of the last by slot."""
        return {slot: self._read(slot, ids, rows=1) for slot, ids in tokens.items()}

    @abstractmethod
    def following(self, tokens: Mapping[int, int], depth: int) -> dict[int, Row]:
        """The draft after a draft, which is the `depth`-th of its round (1 is the first), by slot."""

    def behind(self, slot: int) -> int:
        """Rows that a draft would have to read: one, what a round accepted, or what plain steps have left."""
        return 1 if slot in self._left else self._known(slot) - self._read_to(slot)

    def _read(self, slot: int, tokens: Sequence[int], rows: int) -> Row:
        made = self._read_rows(slot, tokens, self._at(slot, self._read_to(slot) - self._bases[slot]), rows)
        self.lengths[slot] += len(tokens)
        if self._seen[slot]:  # row i has read token i + 1
            self._seen[slot] = {at: row for at, row in self._seen[slot].items() if at > self._read_to(slot)}
        return made

    def _features(self, slot: int, start: int, count: int) -> tuple[list[int], list[Feature]]:
        """Which of `count` rows, from the one `start` behind those that are read, pair a token of a picture, and what stands for it."""
        seen, first = self._seen[slot], self._read_to(slot) + 1 + start
        places = [place for place in range(count) if first + place in seen] if seen else []
        return places, [seen[first + place] for place in places]

    @abstractmethod
    def _read_rows(self, slot: int, tokens: Sequence[int], at: int, rows: int) -> Row:
        """Rows `lengths[slot]`.. from these tokens and the log's states from byte `at` on; logits of the last `rows`, 0 or 1."""

    def _read_to(self, slot: int) -> int:
        """Rows of the text that are read or skipped."""
        return self.lengths[slot] + self._skipped[slot]

    def _known(self, slot: int) -> int:
        return len(self._reader.sequences[slot].tokens)

    def _at(self, slot: int, row: int) -> int:
        """Where row `row` of a slot is in the log, in bytes."""
        return (slot * self._log_rows + row) * self._row_bytes
