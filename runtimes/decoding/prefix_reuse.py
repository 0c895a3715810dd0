"""Reading only what is new of a prompt: a conversation's past is in the decoder already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen_export.runtimes.decoding.decoder import Decoder, Logits, Mark

_MARKS = 8


class PrefixReuse:
    """Keeps one sequence of a decoder in step with a growing conversation.

    A recurrent state cannot be cut back to any position, only to where it was marked. Marks are set at the ends of turns, before the
    model's answer: chat templates rewrite past answers (they drop the reasoning), but not what came before them."""

    def __init__(self, decoder: Decoder, sequence: int = 0) -> None:
        self.decoder, self._sequence = decoder, sequence
        self._marks: list[Mark] = []

    def read(
        self, ids: Sequence[int], mark_at: int | None = None, progress: Callable[[int], None] = lambda count: None
    ) -> tuple[Logits, int]:
        """Bring the sequence to `ids`, setting a mark after `mark_at` of them. Returns the last token's logits and how many tokens did not
        have to be read. `progress` gets the number of tokens that are in the decoder."""
        self._go_back(ids)
        reused = len(self.decoder.tokens(self._sequence))
        if mark_at is not None and reused < mark_at < len(ids):
            self._read(ids, reused, mark_at, progress, want_logits=False)
            self._marks = [*self._marks[1 - _MARKS :], self.decoder.mark(self._sequence)]
            return self._read(ids, mark_at, len(ids), progress), reused
        return self._read(ids, reused, len(ids), progress), reused

    def _read(self, ids: Sequence[int], start: int, stop: int, progress: Callable[[int], None], *, want_logits: bool = True) -> Logits:
        """Read `ids[start:stop]` chunk by chunk, as `prefill` does for itself. What does not fit is refused before the first chunk."""
        chunk, sequence = self.decoder.chunk, self._sequence
        if len(ids) > self.decoder.capacity or stop - start <= chunk:
            logits = self.decoder.prefill(ids[start:stop], sequence, want_logits=want_logits)
            progress(stop)
            return logits
        last = stop - 1 - (stop - 1 - start) % chunk
        for begin in range(start, last, chunk):
            self.decoder.prefill(ids[begin : begin + chunk], sequence, want_logits=False)
            progress(begin + chunk)
        logits = self.decoder.prefill(ids[last:stop], sequence, want_logits=want_logits)
        progress(stop)
        return logits

    def _go_back(self, ids: Sequence[int]) -> None:
        """The furthest point that `ids` goes through and continues beyond."""
        wanted = tuple(ids)
        have = self.decoder.tokens(self._sequence)
        if len(have) < len(wanted) and wanted[: len(have)] == have:
            return
        self._marks = [m for m in self._marks if m.tokens == have[: len(m.tokens)]]
        fitting = [m for m in self._marks if len(m.tokens) < len(wanted) and wanted[: len(m.tokens)] == m.tokens]
        best = max(fitting, key=lambda m: len(m.tokens), default=None)
        if best is None:
            self.decoder.reset(self._sequence)
        else:
            self.decoder.rewind(best, self._sequence)
