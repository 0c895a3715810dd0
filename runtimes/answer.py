"""An answer while it is made: from token ids to pieces of reasoning and content."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.text.detokenizer import Detokenizer
from qwen_export.runtimes.text.reasoning import Content, Event, Reasoning, ReasoningSplitter
from qwen_export.runtimes.text.stopping import StopStrings


class AsyncTokens(Protocol):
    """Token ids for a coroutine; after `close` no more are made."""

    def __aiter__(self) -> AsyncIterator[int]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Prepared:
    """A request for token ids, and what turns these into text. It serves one answer."""

    request: Request
    detokenizer: Detokenizer
    stops: StopStrings
    splitter: ReasoningSplitter | None


class Answer:
    """The text of an answer, piece by piece. `tokens`, `content`, `reasoning` and `statistics` grow as it goes on."""

    def __init__(self, statistics: Statistics, prepared: Prepared) -> None:
        self.statistics = statistics
        self.tokens: list[int] = []
        self.content, self.reasoning = "", ""
        self._request, self._stops = prepared.request, prepared.stops
        self._splitter, self._detokenizer = prepared.splitter, prepared.detokenizer

    def cancel(self) -> None:
        """End after the token in progress; may be called from another thread."""
        self._request.cancelled.set()

    def _push(self, token: int) -> list[Event]:
        """What a token adds; `_stops.stopped` says whether it ends the answer."""
        self.tokens.append(token)
        events = self._emit(self._stops.push(self._detokenizer.push(token)))
        if self._stops.stopped:
            self.statistics.finish = "stop"
        return events

    def _flush(self) -> list[Event]:
        """What is left at the end."""
        events = self._emit(self._stops.push(self._detokenizer.flush()) + self._stops.flush())
        return events + self._record(self._splitter.flush() if self._splitter else [])

    def _emit(self, text: str) -> list[Event]:
        return self._record(self._splitter.push(text) if self._splitter else [Content(text)]) if text else []

    def _record(self, events: Sequence[Event]) -> list[Event]:
        for event in events:
            if isinstance(event, Reasoning):
                self.reasoning += event.text
            else:
                self.content += event.text
        return list(events)


class Generation(Answer):
    """One answer in the making: an iterator over its text."""

    def __init__(self, tokens: Generator[int, None, None], statistics: Statistics, prepared: Prepared) -> None:
        super().__init__(statistics, prepared)
        self._tokens = tokens
        self._events = self._run()

    def __iter__(self) -> Iterator[str]:
        return (event.text for event in self._events if isinstance(event, Content))

    def events(self) -> Iterator[Event]:
        """Pieces of reasoning and answer, in order."""
        return self._events

    def _run(self) -> Iterator[Event]:
        for token in self._tokens:
            yield from self._push(token)
            if self._stops.stopped:
                self._tokens.close()
                break
        yield from self._flush()


class AsyncGeneration(Answer):
    """One answer in the making, for a coroutine: an asynchronous iterator over its text."""

    def __init__(self, tokens: AsyncTokens, statistics: Statistics, prepared: Prepared) -> None:
        super().__init__(statistics, prepared)
        self._tokens = tokens
        self._events = self._run()

    async def __aiter__(self) -> AsyncIterator[str]:
        async for event in self._events:
            if isinstance(event, Content):
                yield event.text

    def events(self) -> AsyncIterator[Event]:
        """Pieces of reasoning and answer, in order."""
        return self._events

    async def _run(self) -> AsyncIterator[Event]:
        try:
            async for token in self._tokens:
                for event in self._push(token):
                    yield event
                if self._stops.stopped:
                    break
        finally:
            self._tokens.close()
        for event in self._flush():
            yield event
