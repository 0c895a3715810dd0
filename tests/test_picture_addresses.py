"""Pictures at http addresses: which hosts are asked, and what becomes of those that answer badly."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qwen_export.errors import ParameterError
from qwen_export.runtimes.vision.picture import open_picture
from qwen_export.runtimes.vision.picture_source import MediaAccess
from tests.support.pictures import SPEC, encoded, photo

PICTURE = encoded(photo(40, 50))


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        if name == "/moved":
            self._head(302, Location="/a.png?again")
        elif name == "/elsewhere":
            self._head(302, Location=f"http://localhost:{self.server.server_port}/a.png")  # type: ignore[attr-defined]
        elif name == "/file":
            self._head(302, Location="file:///etc/hostname")
        elif name == "/loop":
            self._head(302, Location="/loop")
        elif name == "/slow":
            self._head(200, **{"Content-Length": "100000"})
            while True:
                self.wfile.write(b"x")
                time.sleep(0.02)
        elif name == "/short":
            self._head(200, **{"Content-Length": "100000"})
            self.wfile.write(PICTURE)
        elif name == "/endless":
            self._head(200)
            while True:
                self.wfile.write(bytes(1 << 16))
        elif name == "/a.png":
            self._head(200)
            self.wfile.write(PICTURE)
        else:
            self._head(404)

    def _head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):
            super().handle()


@contextmanager
def _serving() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with _serving() as number:
        yield number


NAMED = MediaAccess(hosts=("127.0.0.1",), timeout_s=5.0)


@pytest.mark.parametrize("path", ["a.png", "moved", "a.png?x=%20"])
def test_a_picture_of_a_host_that_is_named(port: int, path: str) -> None:
    assert open_picture(f"http://127.0.0.1:{port}/{path}", SPEC, access=NAMED).digest == open_picture(PICTURE, SPEC).digest


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.png", "status 404"),
        ("elsewhere", "not fetched from this host"),
        ("file", "not fetched from this host"),
        ("loop", "too many redirections"),
        ("short", "could not be fetched"),
    ],
)
def test_what_a_host_may_not_do(port: int, path: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message) as refused:
        open_picture(f"http://127.0.0.1:{port}/{path}", SPEC, "messages[0].content[0]", access=NAMED)
    assert "messages[0].content[0]" in str(refused.value)


def test_a_host_that_sends_too_much(port: int) -> None:
    with pytest.raises(ParameterError, match="a file is too large"):
        open_picture(f"http://127.0.0.1:{port}/endless", SPEC, access=MediaAccess(hosts=NAMED.hosts, most_bytes=1 << 18))
    with pytest.raises(ParameterError, match="a file is too large"):
        open_picture(f"http://127.0.0.1:{port}/short", SPEC, access=MediaAccess(hosts=NAMED.hosts, most_bytes=99_999))


def test_a_host_that_never_ends(port: int) -> None:
    """It sends something all the time, so that no single wait is long."""
    with pytest.raises(ParameterError, match="took too long"):
        open_picture(f"http://127.0.0.1:{port}/slow", SPEC, access=MediaAccess(hosts=NAMED.hosts, timeout_s=0.3))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "169.254.169.254", "0.0.0.0", "2130706433", "0x7f.1"]
)
def test_any_host_is_any_public_one(host: str) -> None:
    with pytest.raises(ParameterError, match=r"private addresses|could not be fetched") as refused:
        open_picture(f"http://{host}:1/a.png", SPEC, access=MediaAccess(hosts=("*",)))
    assert "refused" not in refused.value.got  # no connection was tried


def test_the_address_that_was_checked_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server may say something else the second time."""
    answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 80))], AssertionError("asked again")]

    def look_up(*_: object, **__: object) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(ParameterError, match="private addresses"):
        open_picture("http://example.com/a.png", SPEC, access=MediaAccess(hosts=("*",)))
