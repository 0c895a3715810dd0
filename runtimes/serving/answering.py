"""What takes requests, whoever runs them: an engine, or several on one model."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Generator
from types import TracebackType
from typing import Self

from qwen_export.runtimes.answer import AsyncGeneration, Generation, Prepared
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.serving.engine_statistics import EngineStatistics
from qwen_export.runtimes.serving.token_stream import TokenStream


class Answering(ABC):
    """Takes requests from any thread."""

    @property
    @abstractmethod
    def engines(self) -> tuple[Answering, ...]:
        """Those that run the requests."""

    @property
    @abstractmethod
    def figures(self) -> tuple[EngineStatistics, ...]:
        """Of each engine."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """Answers that are made at once."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens that a sequence may have."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether requests are no longer taken."""

    @abstractmethod
    def submit(
        self, request: Request, statistics: Statistics | None = None, *, loop: asyncio.AbstractEventLoop | None = None
    ) -> TokenStream:
        """Queue a request. Its tokens are read from the stream by a thread, or with `loop` by a coroutine there.

        Raises ContextOverflow for a prompt that does not fit, OverloadedError when too many wait, QwenExportError when it is closed."""

    @abstractmethod
    def close(self, *, drain: bool = False) -> None:
        """Take no more requests and end. Those that run are ended ("abandoned"), or with `drain` finished first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def generate(self, request: Request, statistics: Statistics) -> Generator[int, None, None]:
        """As `Model.generate`: the tokens that follow a prompt. The request is queued at once."""
        return _tokens(self.submit(request, statistics))

    def answer(self, prepared: Prepared) -> Generation:
        """Queue an answer (`Model.prepare_chat`, `prepare_text`): an iterator over its text."""
        statistics = Statistics()
        return Generation(self.generate(prepared.request, statistics), statistics, prepared)

    def answer_async(self, prepared: Prepared) -> AsyncGeneration:
        """As `answer`, for a coroutine of the running event loop."""
        stream = self.submit(prepared.request, loop=asyncio.get_running_loop())
        return AsyncGeneration(stream, stream.statistics, prepared)

    def answers(self, prepared: Prepared, n: int) -> list[Generation]:
        """Queue `n` answers to one prompt. Number i has the seed that the caller gave plus i. The prompt is read once
        where there is {prefix_memory}."""
        return [self.answer(one) for one in prepared.several(n)]

    def answers_async(self, prepared: Prepared, n: int) -> list[AsyncGeneration]:
        """As `answers`, for a coroutine of the running event loop."""
        return [self.answer_async(one) for one in prepared.several(n)]


def _tokens(stream: TokenStream) -> Generator[int, None, None]:
    try:
        yield from stream
    finally:
        stream.close()
