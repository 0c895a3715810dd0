"""A sequence: what one slot of a decoder has read, and whether its memory agrees with that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from qwen_export.errors import QwenExportError


@dataclass(frozen=True, slots=True)
class Media:
    """A picture or video in a prompt: its placeholder ids are those of every other one, so its contents are named by a digest. `start` and
    `count` are positions of its tokens."""

    start: int
    count: int
    digest: bytes


class Prompt(NamedTuple):
    """What a prompt consists of: token ids, and the media that some of them stand for. Two prompts are equal if both are."""

    ids: tuple[int, ...]
    media: tuple[Media, ...] = ()

    def begins_with(self, other: Prompt) -> bool:
        """Whether `other` is a prefix of this prompt. A medium of `other` must be here whole, at the same place."""
        count = len(other.ids)
        if self.ids[:count] != other.ids:
            return False
        return tuple(m for m in self.media if m.start < count) == other.media


class SequenceState:
    """The tokens of one slot.

    `open` of them, the last, come from a verify: `Decoder.accept` may still take them back. `settled` is False while a call changes the
    memory of the slot, and stays so when the call does not return: the memory is then of no defined text, and only going back to a mark, a
    snapshot or the start settles it. `edits` counts how often the sequence went back or was replaced; tokens that a verify read and
    `accept` did not keep are no edit.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.media: tuple[Media, ...] = ()
        self.open = 0
        self.settled = True
        self.edits = 0

    @property
    def length(self) -> int:
        """Tokens read, open ones included."""
        return len(self.tokens)

    def prompt(self) -> Prompt:
        return Prompt(tuple(self.tokens), self.media)

    def extend(self, ids: Sequence[int], media: Iterable[Media], *, commit: bool) -> None:
        """A call has read `ids`; `media` have positions of the sequence."""
        self.tokens.extend(ids)
        self.media += tuple(media)
        self.open = 0 if commit else len(ids)

    def cut(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        if length < len(self.tokens):
            del self.tokens[length:]
            self.media = tuple(m for m in self.media if m.start + m.count <= length)

    def go_back(self, length: int) -> None:
        """The text ends at position `length` again. What came after it cannot be restored."""
        self.cut(length)
        self.open = 0
        self.edits += 1

    def replace(self, prompt: Prompt) -> None:
        self.tokens[:], self.media, self.open = prompt.ids, prompt.media, 0
        self.edits += 1

    def require_settled(self, slot: int) -> None:
        if not self.settled:
            raise QwenExportError(
                "the sequence was interrupted while it was read, and its memory is of no defined text",
                where=f"slot {slot}",
                fix="Rewind it to a mark, restore a snapshot, or reset it.",
            )


class Change:
    """The memory of these sequences changes inside, or between `begin` and `end`; they are settled again only if nothing is raised."""

    __slots__ = ("_sequences",)

    def __init__(self, sequences: Sequence[SequenceState]) -> None:
        self._sequences = sequences

    def begin(self) -> Change:
        for sequence in self._sequences:
            sequence.settled = False
        return self

    def end(self) -> None:
        for sequence in self._sequences:
            sequence.settled = True

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.end()
