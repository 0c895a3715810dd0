"""`qwen-export serve` on a socket that another program has opened, as a supervisor or systemd hands it over."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qwen_export.errors import ParameterError
from qwen_export.runtimes.server.inherited_socket import inherited_socket

if sys.platform == "win32":
    pytest.skip("descriptors are inherited on POSIX systems", allow_module_level=True)

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(words: list[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, env=environment, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def models(port: int) -> list[str]:
    """Those of the server, as soon as it is ready. A request before it listens waits in the socket."""
    while get(port, "/health")[0] == 503:
        time.sleep(0.1)
    return [model["id"] for model in json.loads(get(port, "/v1/models")[1])["data"]]


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def command(bundle: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "qwen_export", "serve", str(bundle), "--max-context", "256", *arguments]


def test_a_descriptor_of_the_parent(demo_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        fd = listening.fileno()
        with serving(command(demo_bundle, "--fd", str(fd)), pass_fds=(fd,)):
            assert models(listening.getsockname()[1]) == [demo_bundle.name]


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="no systemd-socket-activate")
def test_a_socket_of_systemd(demo_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(["systemd-socket-activate", "-l", f"127.0.0.1:{port}", "-E", "PYTHONPATH", *command(demo_bundle)]) as process:
        assert process.stderr is not None and b"Listening" in process.stderr.readline()
        assert models(port) == [demo_bundle.name]


def test_what_is_no_listening_socket() -> None:
    with socket.socket() as silent, open(__file__, "rb") as file:
        for fd in (silent.fileno(), file.fileno(), 987654, 1 << 40):
            with pytest.raises(ParameterError, match="no listening socket"):
                inherited_socket(fd)
        assert silent.fileno() >= 0 and not file.closed


def test_the_environment_of_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inherited_socket() is None
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert inherited_socket() is None, "another process is meant"
    for count in ("2", "many", "-1"):
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", count)
        with pytest.raises(ParameterError, match="several sockets"):
            inherited_socket()
        assert "LISTEN_FDS" not in os.environ, "programs that are started later are not meant"
