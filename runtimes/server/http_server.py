"""uvicorn in a thread of its own, beside the engine's: it listens before the model is loaded, and ends behind the last answer."""

from __future__ import annotations

import os
import socket
import threading
import time

import uvicorn
from starlette.types import ASGIApp

from qwen_export.errors import ParameterError, QwenExportError
from qwen_export.runtimes.server.guarded_protocol import guarded_protocol
from qwen_export.runtimes.server.server_settings import ServerSettings
from qwen_export.runtimes.server.service import Service

_KEEP_ALIVE_S = 75
"""Longer than proxies keep a connection: one that is closed while a proxy uses it again is a 502."""
_BACKLOG = 2048
_POLL_S = 0.02
_END_S = 5
"""For connections to take their last bytes."""


def listening_socket(host: str, port: int) -> socket.socket:
    """A new socket that listens. Port 0: a free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
        if os.name == "posix":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        parameter = "host" if isinstance(error, socket.gaierror) else "port"
        raise ParameterError(
            "the address cannot be used",
            parameter=parameter,
            got=f"{host}:{port} ({error.strerror or error})",
            fix="Give another {host} or {port}, or end the program that uses it.",
        ) from error
    made.listen(_BACKLOG)
    return made


def address_of(listening: socket.socket) -> str:
    """Where a client on this machine reaches it."""
    name = listening.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name[0], name[0])
    return f"http://[{host}]:{name[1]}" if ":" in host else f"http://{host}:{name[1]}"


class HttpServer:
    """Serves an application on a socket from the moment it is made."""

    def __init__(self, app: ASGIApp, listening: socket.socket, settings: ServerSettings) -> None:
        config = uvicorn.Config(
            app,
            http=guarded_protocol(settings),
            ws="none",
            lifespan="off",
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            root_path=settings.root_path,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_END_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, name="http", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise QwenExportError("the HTTP server did not start", fix="See the messages above.")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Close all connections and end the thread."""
        self._server.should_exit = True
        self._thread.join()


def drain(service: Service, seconds: float, hurry: threading.Event) -> int:
    """Take no more requests, and wait for the answers in progress: `seconds` at most, or until `hurry` is set. Returns those left."""
    service.stop()
    until = time.monotonic() + seconds
    while service.open_answers and time.monotonic() < until and not hurry.wait(_POLL_S):
        pass
    return service.open_answers
