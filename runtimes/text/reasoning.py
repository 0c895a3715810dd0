"""Generated text, split into reasoning and answer while it streams.

The split follows what the chat template does to a past message: reasoning is what stands before the first `</think>`, without the line
breaks next to the tags; everything after it is the answer. A tag counts only where the template would put one: `<think>` at the start of
the text, `</think>` while reasoning is open. Anywhere else it is text that talks about tags.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the text inside the `<think>` block."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer."""

    text: str


Event = Reasoning | Content


class _At(Enum):
    START = auto()  # nothing but line breaks so far; a `<think>` opens the reasoning
    REASONING_START = auto()  # behind `<think>`: line breaks and a repeated `<think>` are dropped
    REASONING = auto()
    CONTENT_START = auto()  # behind `</think>`: line breaks are dropped
    CONTENT = auto()


class ReasoningSplitter:
    """Splits one answer; `starts_in_reasoning` is `thinking_prefix` of its prompt.

    Text is held back only while it may still turn out to be a tag, or the line breaks in front of one. Where a piece of text is cut has
    no influence on the result. An answer that never closes its block is reasoning to its end.
    """

    def __init__(self, starts_in_reasoning: bool) -> None:
        self._at = _At.REASONING_START if starts_in_reasoning else _At.START
        self._held = ""

    @property
    def in_reasoning(self) -> bool:
        """Whether the text pushed so far ends inside the `<think>` block."""
        return self._at in (_At.REASONING_START, _At.REASONING)

    def push(self, text: str) -> list[Event]:
        """The events that `text` makes certain."""
        self._held += text
        return list(self._advance())

    def flush(self) -> list[Event]:
        """What was held back when the answer ended. Line breaks at a place where they would have been dropped are dropped."""
        held, self._held = self._held, ""
        match self._at:
            case _At.REASONING_START | _At.REASONING:
                text = held.rstrip("\n") if self._at is _At.REASONING else held.strip("\n")
                return [Reasoning(text)] if text else []
            case _At.CONTENT_START:
                return []
            case _:
                return [Content(held)] if held else []

    def _advance(self) -> Iterator[Event]:
        if self._at is _At.START:
            text = self._held.lstrip("\n")
            if OPEN.startswith(text) and text != OPEN:
                return
            self._at = _At.REASONING_START if text.startswith(OPEN) else _At.CONTENT
        while self._at is _At.REASONING_START:
            text = self._held.lstrip("\n")
            if text.startswith(OPEN):
                self._held = text[len(OPEN) :]
            elif OPEN.startswith(text):
                return
            else:
                self._held, self._at = text, _At.REASONING
        if self._at is _At.REASONING:
            before, tag, after = self._held.partition(CLOSE)
            keep = "" if tag else _tail_to_hold(before)
            text = before.rstrip("\n") if tag else before[: len(before) - len(keep)]
            if text:
                yield Reasoning(text)
            self._held = after if tag else keep
            if not tag:
                return
            self._at = _At.CONTENT_START
        if self._at is _At.CONTENT_START:
            self._held = self._held.lstrip("\n")
            if not self._held:
                return
            self._at = _At.CONTENT
        if self._held:
            text, self._held = self._held, ""
            yield Content(text)


def _tail_to_hold(text: str) -> str:
    """The end of `text` that may belong to a closing tag: the beginning of one, and the line breaks before it."""
    start = len(text)
    for length in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if text.endswith(CLOSE[:length]):
            start -= length
            break
    return text[len(text[:start].rstrip("\n")) :]


def split_reasoning(text: str, starts_in_reasoning: bool) -> tuple[str, str]:
    """Reasoning and answer of a whole text."""
    splitter = ReasoningSplitter(starts_in_reasoning)
    events = splitter.push(text) + splitter.flush()
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    return reasoning, "".join(event.text for event in events if isinstance(event, Content))
