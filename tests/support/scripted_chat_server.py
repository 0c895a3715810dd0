"""A server of the page whose answers are a script: the files as `qwen-export serve` sends them, and the two routes that the page uses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "runtimes" / "server" / "page"
POLICY = "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; object-src 'none'"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

Piece = dict[str, Any]
"""A delta of a chunk; {"finish": reason}, {"usage": ...}, {"error": ...}; {"wait": event} holds the answer until it is set;
{"raw": text}."""


class ScriptedServer:
    """`script`: the pieces of each answer, in order; the last one is repeated. `requests`: the bodies that came. `status`: what models and
    answers are refused with, while it is not 200."""

    def __init__(self, script: list[list[Piece]]) -> None:
        self.script, self.requests, self.fetched = script, [], []
        self.status, self.vision = 200, False
        self.left = threading.Event()
        """Set when a client leaves an answer before its end."""

    @contextmanager
    def running(self) -> Iterator[str]:
        """Gives the address."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                owner.fetched.append(self.path)
                if self.path == "/v1/models":
                    card = {"id": "scripted", "max_model_len": 8192, "capabilities": {"vision": owner.vision}}
                    self._json({"data": [card]})
                    return
                file = PAGE / (self.path.lstrip("/") or "index.html")
                if file.is_file():
                    self._send(200, TYPES[file.suffix], file.read_bytes())
                else:
                    self._send(404, "text/plain", b"")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(body | {"authorization": self.headers.get("Authorization", "")})
                if owner.status != 200:
                    self._json({})
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                pieces = owner.script[min(len(owner.requests), len(owner.script)) - 1]
                try:
                    for piece in pieces:
                        self._piece(piece)
                except OSError:
                    owner.left.set()

            def _piece(self, piece: Piece) -> None:
                if "wait" in piece:
                    while not piece["wait"].wait(0.1):
                        self.wfile.write(b": keep-alive\n\n")
                        self.wfile.flush()
                    return
                if "error" in piece or piece == {}:
                    chunk = piece
                elif "usage" in piece:
                    chunk = {"choices": [], **piece}
                elif "finish" in piece:
                    chunk = {"choices": [{"index": 0, "delta": {}, "finish_reason": piece["finish"]}]}
                else:
                    chunk = {"choices": [{"index": 0, "delta": piece, "finish_reason": None}]}
                data = "[DONE]" if piece == {} else piece.get("raw") or json.dumps(chunk)
                self.wfile.write(f"data: {data}\n\n".encode())
                self.wfile.flush()

            def _json(self, body: dict[str, Any]) -> None:
                if owner.status != 200:
                    body = {"error": {"message": f"refused with {owner.status}", "type": "x"}}
                self._send(owner.status, "application/json", json.dumps(body).encode())

            def _send(self, status: int, kind: str, data: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Content-Security-Policy", POLICY)
                self.end_headers()
                self.wfile.write(data)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            server.server_close()


def answer(*pieces: Piece, finish: str = "stop", tokens: int = 7) -> list[Piece]:
    """A whole answer of these deltas."""
    return [{"role": "assistant", "content": ""}, *pieces, {"finish": finish}, {"usage": {"completion_tokens": tokens}}, {}]
