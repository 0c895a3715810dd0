"""Generated text, split into reasoning and answer while it streams.

The split follows what the chat template does to a past message: reasoning is what stands before the first `</think>`, without the line
breaks next to the tags; everything after it is the answer. A tag counts only where the template would put one: `<think>` at the start of
the text, `</think>` while reasoning is open and once more right behind it. Anywhere else it is text that talks about tags.

A model may call a function without closing its reasoning: `<tool_call>` with `<function=` behind it ends the reasoning, and is part of the
answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from qwen_export.runtimes.text.tag_matching import matches, opens_call

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
    CONTENT_START = auto()  # behind `</think>`: line breaks and a repeated `</think>` are dropped
    CONTENT = auto()


class ReasoningSplitter:
    """Splits one answer; `starts_in_reasoning` is `thinking_prefix` of its prompt, `tool_calls` whether the model was given tools.

    Text is held back only while it may still turn out to be a tag, or the line breaks in front of one. Where a piece of text is cut has
    no influence on the result. An answer that never closes its block is reasoning to its end.
    """

    def __init__(self, starts_in_reasoning: bool, tool_calls: bool = True) -> None:
        self._at = _At.REASONING_START if starts_in_reasoning else _At.START
        self._tool_calls = tool_calls
        self._held = ""
        self._closed_twice = False

    @property
    def in_reasoning(self) -> bool:
        """Whether the text pushed so far ends inside the `<think>` block."""
        return self._at in (_At.REASONING_START, _At.REASONING)

    @property
    def before_content(self) -> bool:
        """Whether the block is closed and nothing of the answer has come."""
        return self._at is _At.CONTENT_START

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
                text = held.lstrip("\n")
                return [Content(text)] if text else []
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
            end, tag = self._end_of_reasoning()
            text = self._held[:end].rstrip("\n")
            if text:
                yield Reasoning(text)
            self._held = self._held[end + len(tag or "") :] if tag is not None else self._held[len(text) :]
            if tag is None:
                return
            self._at = _At.CONTENT_START if tag else _At.CONTENT
        while self._at is _At.CONTENT_START:
            self._held = self._held.lstrip("\n")
            if self._held.startswith(CLOSE) and not self._closed_twice:
                self._held, self._closed_twice = self._held[len(CLOSE) :], True
            elif not self._held or (CLOSE.startswith(self._held) and not self._closed_twice):
                return
            else:
                self._at = _At.CONTENT
        if self._held:
            text, self._held = self._held, ""
            yield Content(text)

    def _end_of_reasoning(self) -> tuple[int, str | None]:
        """Where the held text stops to be certain reasoning, and the tag that ends it there: "" for a call, which is not dropped, and None
        while nothing does."""
        at = self._held.find("<")
        while at >= 0:
            closes = matches(self._held, at, CLOSE)
            calls = self._tool_calls and opens_call(self._held, at)
            if closes or calls:
                return at, CLOSE if closes else ""
            if closes is None or calls is None:
                return at, None
            at = self._held.find("<", at + 1)
        return len(self._held), None


def split_reasoning(text: str, starts_in_reasoning: bool, tool_calls: bool = True) -> tuple[str, str]:
    """Reasoning and answer of a whole text."""
    splitter = ReasoningSplitter(starts_in_reasoning, tool_calls)
    events = splitter.push(text) + splitter.flush()
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    return reasoning, "".join(event.text for event in events if isinstance(event, Content))
