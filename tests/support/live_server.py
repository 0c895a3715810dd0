"""A server on a free port of this machine, with a bundle of its own, for clients that speak HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_export.runtimes import Model, load
from qwen_export.runtimes.server.application import create_app
from qwen_export.runtimes.server.http_server import HttpServer, address_of, listening_socket
from qwen_export.runtimes.server.server_settings import ServerSettings
from qwen_export.runtimes.server.service import Service
from qwen_export.runtimes.serving.engine import Engine


@dataclass
class LiveServer:
    url: str
    port: int
    service: Service
    engine: Engine
    model: Model


@contextlib.contextmanager
def live_server(bundle: Path, settings: ServerSettings | None = None, slots: int = 4, max_context: int = 1024) -> Iterator[LiveServer]:
    settings = settings or ServerSettings()
    service = Service(settings)
    with listening_socket("127.0.0.1", 0) as listening:
        server = HttpServer(create_app(service), listening, settings)
        try:
            with load(bundle, max_context=max_context, threads=1) as model, Engine.of(model, slots) as engine:
                service.prepare(model, engine)
                service.start(model, engine)
                yield LiveServer(address_of(listening), listening.getsockname()[1], service, engine, model)
        finally:
            server.close()
