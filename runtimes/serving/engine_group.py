"""Several engines on one model whose stages are on several devices: while one batch is in a stage, another is in the next one.

    group = EngineGroup.of(model, slots=16)     # an engine per device of the model

One engine keeps one stage busy at a time. Where a step of half of the rows takes much less time than one of all, as with experts, several
engines have a higher rate together (docs/scaling.md has the arithmetic). Each has slots, a prefix cache and a queue of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from qwen_export.errors import ParameterError
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.serving.answering import Answering
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.serving.engine_statistics import EngineStatistics
from qwen_export.runtimes.serving.prompt_routes import PromptRoutes
from qwen_export.runtimes.serving.token_stream import TokenStream

if TYPE_CHECKING:
    from qwen_export.runtimes.model import Model


class EngineGroup(Answering):
    """Divides requests over `engines`: to the one that has read the beginning of the prompt while it has a free slot or no other has, or to
    the one with the fewest requests per slot. What a request gets does not depend on where it runs."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines, self._routes, self._lock = tuple(engines), PromptRoutes(), threading.Lock()

    @classmethod
    def of(
        cls,
        model: Model,
        slots: int = 8,
        *,
        engines: int | None = None,
        cache_memory: int | None = None,
        prefix_memory: int | None = None,
        max_waiting: int | None = None,
    ) -> EngineGroup:
        """Engines that share the slots and the memory (bytes, as of `Engine`); as many as the model has devices, but at most one per slot.

        Steps are recorded before this returns, and verifies of few rows: while one engine records, the others should not use the GPUs.
        What comes later is recorded then, as with drafts for more rows than `Decoder.warm` makes ready."""
        if engines is not None and not 1 <= engines <= slots:
            raise ParameterError(
                "there are more engines than slots",
                parameter="engines",
                got=engines,
                expected=f"1 to {slots}",
                fix="Lower {engines}, or raise {slots}.",
            )
        count = engines or min(slots, len(model.devices))
        with ExitStack() as made:
            group = [
                made.enter_context(
                    Engine.of(
                        model,
                        slots // count + (number < slots % count),
                        cache_memory=None if cache_memory is None else cache_memory // count,
                        prefix_memory=None if prefix_memory is None else prefix_memory // count,
                        share=1 / count,
                        max_waiting=None if max_waiting is None else -(-max_waiting // count),
                    )
                )
                for number in range(count)
            ]
            made.pop_all()
        return cls(group)

    @property
    def engines(self) -> tuple[Engine, ...]:
        return self._engines

    @property
    def figures(self) -> tuple[EngineStatistics, ...]:
        return tuple(engine.statistics for engine in self._engines)

    @property
    def slots(self) -> int:
        return sum(engine.slots for engine in self._engines)

    @property
    def longest(self) -> int:
        return min(engine.longest for engine in self._engines)

    @property
    def closed(self) -> bool:
        """An engine that fails ends the group: its memory is not known to be whole."""
        return any(engine.closed for engine in self._engines)

    def submit(
        self, request: Request, statistics: Statistics | None = None, *, loop: asyncio.AbstractEventLoop | None = None
    ) -> TokenStream:
        with self._lock:
            number = self._number(request.ids)
            stream = self._engines[number].submit(request, statistics, loop=loop)
            self._routes.remember(request.ids, number)
        return stream

    def close(self, *, drain: bool = False) -> None:
        closing = [threading.Thread(target=engine.close, kwargs={"drain": drain}) for engine in self._engines]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()

    def _number(self, ids: Sequence[int]) -> int:
        load = [engine.unfinished / engine.slots for engine in self._engines]
        least = min(range(len(load)), key=load.__getitem__)
        known = self._routes.find(ids)
        return known if known is not None and (load[known] < 1 or load[least] >= 1) else least
