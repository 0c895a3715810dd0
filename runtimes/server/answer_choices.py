"""The stream of events that all protocols are written from: reasoning, content, calls with their arguments, the end.

A request has one choice or several. What a step of the engine gives one of them becomes a `Piece`; one coroutine reads all choices of a
request, without a task for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from qwen_export.runtimes.answer import Answer, Prepared
from qwen_export.runtimes.server.wire_errors import HttpError, stopping
from qwen_export.runtimes.serving.token_stream import TokenStream
from qwen_export.runtimes.structured.answer_events import AnswerEvent, TokenLogprob
from qwen_export.runtimes.text.reasoning import Content, Reasoning
from qwen_export.runtimes.text.tool_calls import CallArguments, CallEnded, CallStarted, ToolCallParser

StreamEvent = Reasoning | Content | CallStarted | CallArguments | CallEnded


class Watcher(Protocol):
    """Counts what choices do."""

    def arrived(self, choice: Choice, tokens: int, gap_s: float) -> None: ...
    def ended(self, choice: Choice) -> None: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step added to a choice. `last`: nothing follows. `tokens`: those of the answer, where log probabilities were asked for."""

    choice: Choice
    events: list[StreamEvent]
    last: bool
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. `completion` holds reasoning and calls, not the stop token; `cached` is a part of `prompt`."""

    prompt: int
    cached: int
    completion: int
    reasoning: int

    def openai(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class Choice(Answer):
    """One answer of a request. `index` is its place among them, `prompt` that of its prompt."""

    def __init__(self, index: int, prompt: int, stream: TokenStream, prepared: Prepared, parser: ToolCallParser | None) -> None:
        super().__init__(stream.statistics, prepared)
        self.index, self.prompt, self.stream, self.prepared = index, prompt, stream, prepared
        self._parser = parser
        self.last_token_at = self.began_at = perf_counter()
        self.over = False

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or token of the request that ended it."""
        return self.statistics.stop_reason

    @property
    def has_logprobs(self) -> bool:
        return self.prepared.options.logprobs is not None

    @property
    def calls(self) -> int:
        """Tool calls that have begun."""
        return self._parser.calls if self._parser is not None else 0

    @property
    def finish(self) -> str:
        """The finish_reason of OpenAI's protocol."""
        if self.statistics.finish != "stop":
            return "length"
        return "tool_calls" if self.calls else "stop"

    def arrived(self, watcher: Watcher) -> Piece:
        """What has come since the last call. Raises what ended the answer where that is no end of an answer."""
        tokens = self.stream.arrived()
        if tokens:
            now = perf_counter()
            watcher.arrived(self, len(tokens), now - self.last_token_at)
            self.last_token_at = now
        events: list[AnswerEvent] = []
        for token in tokens:
            events += self._push(token)
            if self._ended:
                self.stream.close()
                break
        last = self.stream.ended
        if last:
            self._check_end()
            events += self._flush()
        parsed = self._parsed(events)
        if last:
            if self._parser is not None:
                # A call that a limit or a stop string cut off stays open: half a command must not look like a whole one.
                parsed += self._parser.flush(self.statistics.finish == "stop" and not self._stops.stopped)
            self.over = True
            watcher.ended(self)
        given = tuple(token for event in events if event.kind == "answer" for token in event.tokens) if self.has_logprobs else ()
        return Piece(self, joined(parsed), last, given)

    def _check_end(self) -> None:
        finish = self.statistics.finish
        if finish == "deadline":
            raise HttpError(
                "the answer took longer than the server allows",
                status=504,
                code="timeout",
                headers={"x-should-retry": "false"},
                fix="Ask for fewer tokens.",
            )
        if finish not in ("stop", "length", "overflow"):
            raise stopping()

    def _parsed(self, events: Sequence[AnswerEvent]) -> list[StreamEvent]:
        parsed: list[StreamEvent] = []
        for event in events:
            if not event.text:
                continue
            if event.kind == "reasoning":
                parsed.append(Reasoning(event.text))
            elif self._parser is None:
                parsed.append(Content(event.text))
            else:
                parsed += self._parser.push(event.text)
        return parsed


def joined(events: Sequence[StreamEvent]) -> list[StreamEvent]:
    """Neighbors of one kind as one event."""
    if len(events) < 2:
        return list(events)
    made: list[StreamEvent] = []
    for event in events:
        before = made[-1] if made else None
        if isinstance(event, Content) and isinstance(before, Content):
            made[-1] = Content(before.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(before, Reasoning):
            made[-1] = Reasoning(before.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(before, CallArguments) and event.index == before.index:
            made[-1] = CallArguments(event.index, before.text + event.text)
        else:
            made.append(event)
    return made


class Choices:
    """All choices of a request, for one coroutine."""

    def __init__(self, choices: Sequence[Choice], watcher: Watcher) -> None:
        self.all = list(choices)
        self._watcher = watcher
        self._fresh: list[Choice] = []
        self._waiter: asyncio.Future[None] | None = None
        self._woken = self.left = False
        self._open = len(self.all)
        for choice in self.all:
            choice.stream.on_arrival(self._arrival_of(choice))

    def _arrival_of(self, choice: Choice) -> Callable[[], None]:
        def arrived() -> None:
            if choice not in self._fresh:
                self._fresh.append(choice)
            self._resume()

        return arrived

    def _resume(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> list[Piece] | None:
        """What has arrived: [] when `wake` was called meanwhile, None behind the end of all choices and after `leave`."""
        if not self._open or self.left:
            return None
        if not self._fresh and not self._woken:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.left:
            return None
        self._woken = False
        fresh, self._fresh = self._fresh, []
        pieces = [choice.arrived(self._watcher) for choice in fresh if not choice.over]
        self._open -= sum(piece.last for piece in pieces)
        return pieces

    def wake(self) -> None:
        """Let `next` return."""
        self._woken = True
        self._resume()

    def leave(self) -> None:
        """The reader has gone: every choice ends within one step."""
        self.left = True
        self.close()
        self._resume()

    def close(self) -> None:
        for choice in self.all:
            if not choice.over:
                choice.over = True
                choice.stream.close()
                self._watcher.ended(choice)

    @property
    def waiting(self) -> bool:
        """Whether no choice has had a slot yet."""
        return not any(choice.statistics.queued_s or choice.statistics.finish for choice in self.all)

    @property
    def usage(self) -> Usage:
        """Of all choices; a prompt that several share counts once."""
        prompts = {choice.prompt: choice.statistics for choice in reversed(self.all)}
        return Usage(
            sum(statistics.prompt_tokens for statistics in prompts.values()),
            sum(statistics.reused_tokens for statistics in prompts.values()),
            sum(len(choice.tokens) for choice in self.all),
            sum(choice.statistics.reasoning_tokens for choice in self.all),
        )
