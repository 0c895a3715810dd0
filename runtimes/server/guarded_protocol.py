"""Connections of uvicorn with limits that it does not have: the size of headers, and the time for them to arrive."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from qwen_export.runtimes.server.answer_response import ABORT
from qwen_export.runtimes.server.server_settings import ServerSettings

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def guarded_protocol(settings: ServerSettings) -> type[HttpToolsProtocol]:
    """The class of connections for these limits. A piece of data that completes its headers is not refused, so they may be a little larger
    than `max_headers`."""

    class GuardedProtocol(HttpToolsProtocol):
        _waiting: asyncio.TimerHandle | None = None
        """Runs while headers are not complete."""
        _seen = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._waiting is not None:
                self._seen += len(data)
                if self._seen > settings.max_headers and not self.transport.is_closing():
                    self._stop_waiting()
                    self.transport.write(_TOO_LARGE)
                    self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["extensions"] = {ABORT: {"call": self.transport.abort}}
            self._wait()

        def on_headers_complete(self) -> None:
            self._stop_waiting()
            super().on_headers_complete()

        def _wait(self) -> None:
            self._stop_waiting()
            self._seen = 0
            self._waiting = self.loop.call_later(settings.header_timeout_s, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

    return GuardedProtocol
