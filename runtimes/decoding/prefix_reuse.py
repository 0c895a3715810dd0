"""Reading only what is new of a prompt: a conversation's past is in the decoder already."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_export.runtimes.decoding.decoder import Decoder, Logits, Mark

_MARKS = 8


class PrefixReuse:
    """Keeps one sequence of a decoder in step with a growing conversation.

    A recurrent state cannot be cut back to any position, only to where it was marked. Marks are set at the ends of turns, before the
    model's answer: chat templates rewrite past answers (they drop the reasoning), but not what came before them."""

    def __init__(self, decoder: Decoder, sequence: int = 0) -> None:
        self.decoder, self._sequence = decoder, sequence
        self._marks: list[Mark] = []

    def read(self, ids: Sequence[int], mark_at: int | None = None) -> tuple[Logits, int]:
        """Bring the sequence to `ids`, setting a mark after `mark_at` of them. Returns the last token's logits and how many tokens did not
        have to be read."""
        self._go_back(ids)
        reused = len(self.decoder.tokens(self._sequence))
        if mark_at is not None and reused < mark_at < len(ids):
            self.decoder.prefill(ids[reused:mark_at], self._sequence, want_logits=False)
            self._marks = [*self._marks[1 - _MARKS :], self.decoder.mark(self._sequence)]
            return self.decoder.prefill(ids[mark_at:], self._sequence), reused
        return self.decoder.prefill(ids[reused:], self._sequence), reused

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
