"""Answers as ASGI responses: streams of server-sent events and whole bodies, which end when their client leaves.

A step of the engine is one write per stream. Nothing is written ahead of a slow reader: while its buffer is full its tokens wait as ids.
A reader that takes nothing for `write_timeout_s` is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen_export.runtimes.server.answer_choices import Choices, Piece
from qwen_export.runtimes.server.server_settings import ServerSettings
from qwen_export.runtimes.server.wire_errors import HttpError, Refusal, error_body, refusal_of

ABORT = "qwen_export.abort"
"""The ASGI extension with which `http_server.py` offers to drop a connection at once."""
_COMMENT = b": keep-alive\n\n"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class StreamWriter(Protocol):
    """Events of one protocol as bytes."""

    def begin(self) -> bytes: ...
    def piece(self, piece: Piece) -> bytes: ...
    def end(self) -> bytes: ...
    def error(self, refusal: Refusal) -> bytes: ...


class _Answering(Response):
    """What both forms share: they watch the client and the clock, and free what they hold."""

    def __init__(self, choices: Choices, settings: ServerSettings, done: Callable[[], None]) -> None:
        self.background = None
        self._choices, self._settings, self._done = choices, settings, done
        self._began = self._touched = asyncio.get_running_loop().time()
        self._writing = self._cut = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        listener = loop.create_task(_left(receive))
        listener.add_done_callback(lambda _: self._choices.leave())
        task = asyncio.current_task()
        every = min(1.0, self._settings.keep_alive_s / 2, self._settings.write_timeout_s / 2)

        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal timer
            timer = loop.call_later(every, look)
            now = loop.time()
            if self._writing:
                if now - self._touched > self._settings.write_timeout_s and task is not None:
                    self._cut = True
                    task.cancel()
            elif self._is_late(now) or now - self._touched >= self._settings.keep_alive_s:
                self._choices.wake()

        timer = loop.call_later(every, look)
        try:
            await self._answer(scope, send)
        except asyncio.CancelledError:
            if not self._cut:
                raise
            abort = scope.get("extensions", {}).get(ABORT)
            if abort is not None:
                abort["call"]()
        finally:
            timer.cancel()
            self._choices.close()
            self._done()
            listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listener

    def _is_late(self, now: float) -> bool:
        limit = self._settings.queue_timeout_s
        return limit is not None and now - self._began > limit and self._choices.waiting

    def _check_queue(self) -> None:
        if self._is_late(asyncio.get_running_loop().time()):
            raise HttpError(
                "the request waited too long for a slot",
                status=503,
                code="queue_timeout",
                headers={"Retry-After": "5"},
                fix="Send the request again later.",
            )

    async def _answer(self, scope: Scope, send: Send) -> None:
        raise NotImplementedError


class EventStream(_Answering):
    """Server-sent events."""

    def __init__(self, choices: Choices, writer: StreamWriter, settings: ServerSettings, done: Callable[[], None]) -> None:
        super().__init__(choices, settings, done)
        self._writer = writer

    async def _answer(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await self._write(send, self._writer.begin())
        clock, choices, writer = asyncio.get_running_loop().time, self._choices, self._writer
        try:
            while (pieces := await choices.next()) is not None:
                data = b"".join([writer.piece(piece) for piece in pieces])
                if data:
                    await self._write(send, data)
                elif clock() - self._touched >= self._settings.keep_alive_s:
                    await self._write(send, _COMMENT)
                if not pieces:
                    self._check_queue()
            if choices.left:
                return
            data = writer.end()
        except Exception as error:
            data = writer.error(refusal_of(error))
        await self._write(send, data, more=False)

    async def _write(self, send: Send, data: bytes, more: bool = True) -> None:
        self._touched, self._writing = asyncio.get_running_loop().time(), True
        await send({"type": "http.response.body", "body": data, "more_body": more})
        self._writing = False


class WholeAnswer(_Answering):
    """One JSON body, made by `render` from the pieces of all choices."""

    def __init__(
        self, choices: Choices, render: Callable[[list[Piece]], dict[str, Any]], settings: ServerSettings, done: Callable[[], None]
    ) -> None:
        super().__init__(choices, settings, done)
        self._render = render

    async def _answer(self, scope: Scope, send: Send) -> None:
        status, headers = 200, [(b"content-type", b"application/json")]
        pieces: list[Piece] = []
        try:
            while (more := await self._choices.next()) is not None:
                pieces += more
                if not more:
                    self._check_queue()
            if self._choices.left:
                return
            body = json.dumps(self._render(pieces), ensure_ascii=False).encode()
        except Exception as error:
            refusal = refusal_of(error)
            status, body = refusal.status, error_body(refusal, scope["path"])
            headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
        self._touched, self._writing = asyncio.get_running_loop().time(), True
        await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await send({"type": "http.response.body", "body": body})
        self._writing = False


async def _left(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
