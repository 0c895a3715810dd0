"""How an answer is shown while it is made: as Markdown on a terminal, or as plain text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from qwen_export.terminal.printable import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live

EVERY_S = 0.08
"""Seconds between two pictures of the part that still changes."""


class AnswerView(Protocol):
    """Shows one answer after the other. `end` may come without any text."""

    def progress(self, done: int, total: int) -> None:
        """While the prompt is read: tokens read so far, and all of them."""

    def reasoning(self, text: str) -> None: ...
    def content(self, text: str) -> None: ...
    def end(self) -> None: ...


class PlainView:
    """Pieces of text as they come: the answer to `write`, its reasoning to `aside`. Each answer ends with a line break."""

    def __init__(self, write: Callable[[str], None], aside: Callable[[str], None]) -> None:
        self._write, self._aside = write, aside
        self._reasoned = self._answered = False

    def progress(self, done: int, total: int) -> None:
        pass

    def reasoning(self, text: str) -> None:
        self._reasoned = True
        self._aside(text)

    def content(self, text: str) -> None:
        self._end_reasoning()
        self._answered = True
        self._write(text)

    def end(self) -> None:
        self._end_reasoning()
        if self._answered:
            self._write("\n")
        self._answered = False

    def _end_reasoning(self) -> None:
        if self._reasoned:
            self._aside("\n\n")
        self._reasoned = False


class MarkdownView:
    """Markdown on a terminal. A block is printed for good when the next one has begun, so that the text can be scrolled; only the last
    block is drawn again while it grows, and of it no more than fits on the screen. Reasoning is dim plain text."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console, self._now = console, now
        self._live: Live | None = None
        self._text, self._in_reasoning, self._drawn = "", False, 0.0
        self._printed = False

    def progress(self, done: int, total: int) -> None:
        if total and done < total:
            self._draw(_dim(f"reading the prompt: {done} of {total} tokens"))

    def reasoning(self, text: str) -> None:
        self._push(text, True)

    def content(self, text: str) -> None:
        self._push(text, False)

    def end(self) -> None:
        self._finish_part()
        if self._live is not None:
            self._live.stop()
        self._live = None
        if self._printed:
            self._console.print()
        self._printed = False

    def _push(self, text: str, reasoning: bool) -> None:
        if reasoning != self._in_reasoning:
            self._finish_part()
            self._in_reasoning = reasoning
        self._text += printable(text)
        if "\n" in text:
            end = self._text.rfind("\n") + 1 if reasoning else finished_blocks(self._text)
            self._print(self._text[:end])
            self._text = self._text[end:]
        self._draw(self._shown(self._text))

    def _finish_part(self) -> None:
        """Print what is left of the reasoning, or of the answer."""
        text, self._text = self._text, ""
        if self._live is not None:
            self._draw("", now=True)
        self._print(text)
        if self._in_reasoning and self._printed:
            self._console.print()
            self._printed = False
        self._in_reasoning = False

    def _print(self, text: str) -> None:
        """Above the part that still changes."""
        if self._in_reasoning and text:
            self._console.print(_dim(text.removesuffix("\n")))
        elif text.strip():
            if self._printed:
                self._console.print()  # between two blocks, as within a document
            self._console.print(self._shown(text))
        self._printed = self._printed or bool(text.strip())

    def _shown(self, text: str) -> RenderableType:
        from rich.markdown import Markdown

        return _dim(text) if self._in_reasoning else Markdown(text, code_theme="ansi_dark")

    def _draw(self, shown: RenderableType, *, now: bool = False) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()
        if now or self._now() - self._drawn >= EVERY_S:
            self._live.update(_Tail(shown), refresh=True)
            self._drawn = self._now()


class _Tail:
    """The last lines of something, as many as the screen has."""

    def __init__(self, shown: RenderableType) -> None:
        self._shown = shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        lines = console.render_lines(self._shown, options, pad=False) if self._shown != "" else []
        for number, line in enumerate(lines[-max(1, console.height - 1) :]):
            if number:
                yield Segment.line()
            yield from line


def _dim(text: str) -> RenderableType:
    from rich.text import Text

    return Text(text, style="dim")


def finished_blocks(text: str) -> int:
    """Characters of Markdown that no further text changes: all blocks but the last. Lines that are not complete do not count."""
    from markdown_it import MarkdownIt

    complete = text[: text.rfind("\n") + 1]
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(complete)
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map is not None]
    if len(starts) < 2:
        return 0
    return sum(len(line) + 1 for line in complete.split("\n")[: starts[-1]])
