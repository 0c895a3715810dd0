"""An answer while it is made: from token ids to pieces of reasoning and content."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.text.detokenizer import Detokenizer
from qwen_export.runtimes.text.reasoning import Content, Event, Reasoning, ReasoningSplitter
from qwen_export.runtimes.text.stopping import StopStrings


class Generation:
    """One answer in the making: an iterator over its text. `tokens`, `content`, `reasoning` and `statistics` grow as it goes on."""

    def __init__(
        self,
        tokens: Generator[int, None, None],
        statistics: Statistics,
        request: Request,
        detokenizer: Detokenizer,
        stops: StopStrings,
        splitter: ReasoningSplitter | None,
    ) -> None:
        self.statistics = statistics
        self.tokens: list[int] = []
        self.content, self.reasoning = "", ""
        self._request, self._stops, self._splitter, self._detokenizer = request, stops, splitter, detokenizer
        self._tokens = tokens
        self._events = self._run()

    def __iter__(self) -> Iterator[str]:
        return (event.text for event in self._events if isinstance(event, Content))

    def events(self) -> Iterator[Event]:
        """Pieces of reasoning and answer, in order."""
        return self._events

    def cancel(self) -> None:
        """End after the token in progress; may be called from another thread."""
        self._request.cancelled.set()

    def _run(self) -> Iterator[Event]:
        for token in self._tokens:
            self.tokens.append(token)
            yield from self._emit(self._stops.push(self._detokenizer.push(token)))
            if self._stops.stopped:
                self.statistics.finish = "stop"
                self._tokens.close()
                break
        yield from self._emit(self._stops.push(self._detokenizer.flush()) + self._stops.flush())
        yield from self._record(self._splitter.flush() if self._splitter else [])

    def _emit(self, text: str) -> Iterator[Event]:
        if text:
            yield from self._record(self._splitter.push(text) if self._splitter else [Content(text)])

    def _record(self, events: Sequence[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Reasoning):
                self.reasoning += event.text
            else:
                self.content += event.text
            yield event
