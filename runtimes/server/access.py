"""Who may ask, checked before a body is read: pure ASGI, so that streams pass through untouched.

Keys are compared in constant time. A page of another site that a person opens may send requests to a server on this machine: by a name
that resolves to the loopback address (the Host header tells), or as a form, which browsers send without asking first.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen_export.runtimes.server.server_settings import ServerSettings
from qwen_export.runtimes.server.wire_errors import HttpError, error_body, refusal_of

_GUARDED = ("/v1/", "/tokenize", "/detokenize")
"""Beginnings of addresses that need a key where keys are set."""


class Access:
    """Answers 401 and 403 itself."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._keys = [key.encode() for key in settings.api_keys]
        self._hosts = frozenset(host.lower() for host in settings.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except HttpError as error:
            await send_error(error, scope, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts and host_name(headers.get("host", "")) not in self._hosts:
            raise HttpError(
                "the Host header names another server",
                status=403,
                code="unknown_host",
                got=headers.get("host", "")[:100],
                expected=", ".join(sorted(self._hosts)),
                fix="Use one of these names, or allow the name where the server is started.",
            )
        foreign = "origin" in headers and headers["origin"] not in self._settings.cors_origins
        if foreign and scope["method"] == "POST" and "json" not in headers.get("content-type", ""):
            raise HttpError(
                "a page of another site sent a form", status=403, got=headers["origin"][:100], fix="Send Content-Type: application/json."
            )
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._keys and scope["method"] != "OPTIONS" and path.startswith(_GUARDED):
            self._check_key(headers)

    def _check_key(self, headers: Headers) -> None:
        given = headers.get("x-api-key", "")
        kind, _, value = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            given = value.strip()
        if not _one_of(given.encode("latin-1", "replace"), self._keys):
            raise HttpError(
                "the key is not one of this server" if given else "a key is required",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
                fix="Send a valid key in the header Authorization: Bearer KEY.",
            )


def _one_of(given: bytes, keys: Iterable[bytes]) -> bool:
    """All keys are compared, whichever fits."""
    found = False
    for key in keys:
        found |= hmac.compare_digest(given, key)
    return found


def host_name(host: str) -> str:
    """The name in a Host header: example.org of example.org:80, ::1 of [::1]:80."""
    host = host.strip().lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


async def send_error(error: BaseException, scope: Scope, send: Send, retry_after: int = 1) -> None:
    """A whole answer that says what is wrong."""
    refusal = refusal_of(error, retry_after)
    body = error_body(refusal, scope["path"])
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in refusal.headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
