"""A stand-in of the Hugging Face hub's HTTP API on this machine: files of directories as repositories."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT, OTHER = "a" * 40, "b" * 40


class Hub:
    """`repositories` by id; `token` is needed for those in `private`. `asked` has method, path and range of each request."""

    def __init__(self, repositories: dict[str, Path], private: set[str], token: str) -> None:
        self.repositories, self.private, self.token = repositories, private, token
        self.asked: list[tuple[str, str, str]] = []
        self.address = ""

    def bytes_of(self, suffix: str) -> int:
        """How many bytes of files of this kind were sent, as their ranges say; 0 where none was asked for."""
        return sum(int(span.rpartition(" ")[2]) for method, path, span in self.asked if method == "GET" and path.endswith(suffix))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = listing or tree or file
        name, revision = (found[1], found[2] or "main") if found else ("", "")
        directory = self.hub.repositories.get(name)
        if directory is None or (name in self.hub.private and self.headers.get("Authorization") != f"Bearer {self.hub.token}"):
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)
        elif revision not in ("main", COMMIT, "v1"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
        elif file:
            self._file(directory / file[3], body=body)
        else:
            names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
            if tree:
                entries = [{"type": "file", "path": n, "size": (directory / n).stat().st_size, "oid": _etag(directory / n)} for n in names]
                self._send(200, json.dumps(entries).encode(), {}, body=body)
            else:
                siblings = [{"rfilename": n} for n in names]
                self._send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), {}, body=body)

    def _file(self, path: Path, *, body: bool) -> None:
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
            return
        data, headers = path.read_bytes(), {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self._send(200, data, headers, body=body)
            return
        start, stop = int(span[1]), min(int(span[2] or len(data)) + 1, len(data))
        self._send(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, body=body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.hub.asked.append((self.command, self.path.partition("?")[0], f"{self.headers.get('Range', '')} {len(data) if body else 0}"))
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def hub_server(repositories: dict[str, Path], private: set[str] | None = None, token: str = "hf_secret") -> Iterator[Hub]:
    hub = Hub(repositories, private or set(), token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
