"""Reading only what is new of a prompt: the decoder has read the past of a conversation already."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.logit_rows import Rows
from qwen_export.runtimes.decoding.prompt_pictures import PromptPictures, prompt_read
from qwen_export.runtimes.decoding.sequence import Prompt
from qwen_export.runtimes.decoding.snapshot import Mark
from qwen_export.runtimes.sampling.logprobs import PromptRecorder

_MARKS = 8

Continue = Callable[[int], bool]
"""Called between two reads of a prompt with the tokens read so far; False ends the reading, which the next prompt resumes."""


class Reading(NamedTuple):
    """What reading a prompt came to. `rows` has the last token's logits, None when the reading was ended before."""

    rows: Rows | None
    reused: int


class PrefixReuse:
    """Keeps one slot of a decoder in step with a growing conversation.

    A recurrent state cannot be cut back to any position, only to where it was marked. Marks are set at the ends of turns, before the
    model's answer: chat templates rewrite past answers (they drop the reasoning), but not what came before them. Prompts are compared by
    token ids and by the digests of their media."""

    def __init__(self, decoder: Decoder, slot: int = 0) -> None:
        self.decoder, self.slot = decoder, slot
        self._marks: list[Mark] = []

    def read(
        self,
        prompt: Prompt,
        mark_at: int | None = None,
        go_on: Continue = lambda read: True,
        recorder: PromptRecorder | None = None,
        pictures: PromptPictures | None = None,
    ) -> Reading:
        """Bring the sequence to `prompt`, with what its `pictures` add, setting a mark after `mark_at` of its tokens. `reused` tokens did
        not have to be read: none where a recorder gets the logits of all."""
        if recorder is None:
            self._go_back(prompt)
        else:
            self.decoder.reset(self.slot)
        reused = position = self.decoder.sequences[self.slot].length
        cuts = [len(prompt.ids)]
        if mark_at is not None and reused < mark_at < len(prompt.ids):
            cuts.insert(0, mark_at)
        self.decoder.require_room(self.slot, len(prompt.ids) - reused)
        rows: Rows | None = None
        for cut in cuts:
            last, chunk = cut == len(prompt.ids), self.decoder.logit_tokens if recorder is not None else None
            for start, stop, logits in self.decoder.parts(cut - position, self.slot, chunk, want_logits=last):
                if not go_on(position + start):
                    return Reading(None, reused)
                wanted = logits if recorder is None else stop - start
                read = prompt_read(self.slot, prompt.ids, position + start, position + stop, prompt.media, pictures, wanted)
                [rows] = self.decoder.run([read])
                if recorder is not None:
                    recorder.add(rows, prompt.ids[position + start + 1 : position + stop + 1])
                    rows = rows.part(stop - start - 1)
            position = cut
            if cut == mark_at:
                self._marks = [*self._marks[1 - _MARKS :], self.decoder.mark(self.slot)]
        return Reading(rows, reused)

    def _go_back(self, wanted: Prompt) -> None:
        """The furthest point that `wanted` goes through and continues beyond."""
        sequence = self.decoder.sequences[self.slot]
        have = sequence.prompt()
        if sequence.settled and len(have.ids) < len(wanted.ids) and wanted.begins_with(have):
            return
        self._marks = [mark for mark in self._marks if have.begins_with(mark.prompt)]
        fitting = [mark for mark in self._marks if len(mark.tokens) < len(wanted.ids) and wanted.begins_with(mark.prompt)]
        best = max(fitting, key=lambda mark: len(mark.tokens), default=None)
        if best is None:
            self.decoder.reset(self.slot)
        else:
            self.decoder.rewind(best, self.slot)
