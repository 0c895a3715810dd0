"""An answer while it is made: from token ids to pieces of reasoning and answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

from qwen_export.errors import ParameterError
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.sampling.logprobs import ChosenLogprob
from qwen_export.runtimes.structured.answer_events import AnswerEvent, AnswerKind, Candidate, TokenLogprob
from qwen_export.runtimes.structured.answer_options import AnswerOptions
from qwen_export.runtimes.text.detokenizer import Detokenizer
from qwen_export.runtimes.text.reasoning import Reasoning, ReasoningSplitter
from qwen_export.runtimes.text.stopping import StopStrings
from qwen_export.runtimes.text.tool_calls import CallEnded, ToolCallParser


class AsyncTokens(Protocol):
    """Token ids for a coroutine; after `close` no more are made."""

    def __aiter__(self) -> AsyncIterator[int]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Prepared:
    """A request for token ids, and what turns these into text. It serves one answer; `again(i)` prepares number i of several answers to
    the same prompt, each with a seed of its own where the caller gave one."""

    request: Request
    detokenizer: Detokenizer
    stops: StopStrings
    splitter: ReasoningSplitter | None
    single_call: ToolCallParser | None
    """Reads the answer where it ends behind its first call."""
    options: AnswerOptions
    again: Callable[[int], Prepared]

    def several(self, n: int) -> list[Prepared]:
        """This one, and others to the same prompt: `n` in all."""
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ParameterError(
                "the number of answers is not usable", parameter="n", got=repr(n), expected="an integer >= 1", fix="Raise {n}."
            )
        return [self, *(self.again(index) for index in range(1, n))]


class Answer:
    """The text of an answer, piece by piece. `tokens`, `content`, `reasoning` and `statistics` grow as it goes on."""

    def __init__(self, statistics: Statistics, prepared: Prepared) -> None:
        self.statistics = statistics
        self.tokens: list[int] = []
        self.content, self.reasoning = "", ""
        self._request, self._stops, self._options = prepared.request, prepared.stops, prepared.options
        self._splitter, self._detokenizer, self._single_call = prepared.splitter, prepared.detokenizer, prepared.single_call
        self._ended = False
        """Whether the text ends the answer, which the tokens do not know of."""
        self._waiting: dict[AnswerKind, list[TokenLogprob]] = {"reasoning": [], "answer": []}

    def cancel(self) -> None:
        """End after the token in progress; may be called from another thread."""
        self._request.cancelled.set()

    def _push(self, token: int) -> list[AnswerEvent]:
        """What a token adds; `_ended` says whether it ends the answer."""
        self.tokens.append(token)
        reasoning = self._splitter is not None and self._splitter.in_reasoning
        text = self._detokenizer.push(token)
        if len(self.tokens) > self._options.min_new_tokens:
            text = self._stops.push(text)
        pieces = self._split(text)
        # A closing tag, and line breaks behind it, are tokens of the reasoning.
        reasoning = reasoning or (self._splitter is not None and self._splitter.before_content)
        self.statistics.reasoning_tokens += reasoning
        self._note("reasoning" if reasoning else "answer")
        self._ended = self._stops.stopped or self._has_called(pieces)
        if self._ended:
            self.statistics.finish, self.statistics.stop_reason = "stop", self._stops.matched
        return self._events(pieces)

    def _has_called(self, pieces: list[tuple[AnswerKind, str]]) -> bool:
        """Whether the only call of the answer is complete."""
        parser = self._single_call
        if parser is None:
            return False
        return any(isinstance(event, CallEnded) for kind, text in pieces if kind == "answer" for event in parser.push(text))

    def _flush(self) -> list[AnswerEvent]:
        """What is left at the end."""
        pieces = self._split(self._stops.push(self._detokenizer.flush()) + self._stops.flush())
        pieces += [(_kind(event), event.text) for event in self._splitter.flush()] if self._splitter else []
        events = self._events(pieces)
        return events + [AnswerEvent(kind, "", self._take(kind)) for kind, tokens in self._waiting.items() if tokens]

    def _split(self, text: str) -> list[tuple[AnswerKind, str]]:
        if not text:
            return []
        return [(_kind(event), event.text) for event in self._splitter.push(text)] if self._splitter else [("answer", text)]

    def _events(self, pieces: list[tuple[AnswerKind, str]]) -> list[AnswerEvent]:
        """Pieces with the tokens that have come; reasoning comes before the answer."""
        events = []
        for kind, text in pieces:
            if kind == "answer" and self._waiting["reasoning"]:
                events.append(AnswerEvent("reasoning", "", self._take("reasoning")))
            events.append(AnswerEvent(kind, text, self._take(kind)))
            if kind == "reasoning":
                self.reasoning += text
            else:
                self.content += text
        return events

    def _note(self, kind: AnswerKind) -> None:
        """The log probability of the last token waits for the next piece of its kind."""
        recorder = self._request.sampler.recorder
        if recorder is not None:
            self._waiting[kind].append(self._named(recorder.chosen[len(self.tokens) - 1]))

    def _named(self, found: ChosenLogprob) -> TokenLogprob:
        text = self._detokenizer.bytes_of
        top = tuple(Candidate(token, text(token), logprob) for token, logprob in found.top)
        return TokenLogprob(found.token, text(found.token), found.logprob, top)

    def _take(self, kind: AnswerKind) -> tuple[TokenLogprob, ...]:
        taken, self._waiting[kind] = tuple(self._waiting[kind]), []
        return taken


def _kind(event: object) -> AnswerKind:
    return "reasoning" if isinstance(event, Reasoning) else "answer"


class Generation(Answer):
    """One answer in the making: an iterator over its text."""

    def __init__(self, tokens: Generator[int, None, None], statistics: Statistics, prepared: Prepared) -> None:
        super().__init__(statistics, prepared)
        self._tokens = tokens
        self._made = self._run()

    def __iter__(self) -> Iterator[str]:
        return (event.text for event in self._made if event.kind == "answer" and event.text)

    def events(self) -> Iterator[AnswerEvent]:
        """Pieces of reasoning and answer, in order."""
        return self._made

    def _run(self) -> Iterator[AnswerEvent]:
        for token in self._tokens:
            yield from self._push(token)
            if self._ended:
                self._tokens.close()
                break
        yield from self._flush()


class AsyncGeneration(Answer):
    """One answer in the making, for a coroutine: an asynchronous iterator over its text."""

    def __init__(self, tokens: AsyncTokens, statistics: Statistics, prepared: Prepared) -> None:
        super().__init__(statistics, prepared)
        self._tokens = tokens
        self._made = self._run()

    async def __aiter__(self) -> AsyncIterator[str]:
        async for event in self._made:
            if event.kind == "answer" and event.text:
                yield event.text

    def events(self) -> AsyncIterator[AnswerEvent]:
        """Pieces of reasoning and answer, in order."""
        return self._made

    async def _run(self) -> AsyncIterator[AnswerEvent]:
        try:
            async for token in self._tokens:
                for event in self._push(token):
                    yield event
                if self._ended:
                    break
        finally:
            self._tokens.close()
        for event in self._flush():
            yield event
