"""An engine whose answers are known: the texts that a test gives, as the tokens of a real tokenizer, in steps of random size."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_export.runtimes import Model, load
from qwen_export.runtimes.decoding.generation import Finish, Request, Statistics
from qwen_export.runtimes.server.application import create_app
from qwen_export.runtimes.server.http_server import HttpServer, address_of, listening_socket
from qwen_export.runtimes.server.server_settings import ServerSettings
from qwen_export.runtimes.server.service import Service
from qwen_export.runtimes.serving.answering import Answering
from qwen_export.runtimes.serving.engine_statistics import EngineStatistics
from qwen_export.runtimes.serving.token_stream import End, LoopInbox, TokenStream


class ScriptedEngine(Answering):
    """`text` is the next answer, `finish` its end; `step` the most tokens that come at once."""

    closed, slots, longest = False, 8, 4096

    def __init__(self, model: Model) -> None:
        self._model = model
        self.statistics = EngineStatistics(slots=self.slots)
        self.text, self.step, self.error = "", 1, None
        self.finish: Finish = "stop"
        self.url = ""
        self._chance = random.Random(3)

    @property
    def engines(self) -> tuple[ScriptedEngine, ...]:
        return (self,)

    @property
    def figures(self) -> tuple[EngineStatistics, ...]:
        return (self.statistics,)

    def close(self, *, drain: bool = False) -> None:
        pass

    def submit(
        self, request: Request, statistics: Statistics | None = None, *, loop: asyncio.AbstractEventLoop | None = None
    ) -> TokenStream:
        assert loop is not None
        statistics = statistics or Statistics()
        inbox = LoopInbox(loop)
        tokens = self._model.tokenizer.encode(self.text)
        statistics.prompt_tokens, statistics.queued_s, statistics.first_token_s = len(request.ids), 0.001, 0.002

        async def play() -> None:
            left = list(tokens)
            while left:
                size = self._chance.randint(1, self.step)
                inbox.put(left[:size])
                left = left[size:]
                await asyncio.sleep(0)
            statistics.finish, statistics.new_tokens = self.finish, len(tokens)
            inbox.put(End(self.error))

        self._playing = loop.create_task(play())
        return TokenStream(request, statistics, inbox)


@contextmanager
def scripted_engine(bundle: Path, settings: ServerSettings | None = None) -> Iterator[ScriptedEngine]:
    settings = settings or ServerSettings()
    service = Service(settings)
    with listening_socket("127.0.0.1", 0) as listening, load(bundle, threads=1) as model:
        engine = ScriptedEngine(model)
        engine.url = address_of(listening)
        service.start(model, engine)
        server = HttpServer(create_app(service), listening, settings)
        try:
            yield engine
        finally:
            server.close()
