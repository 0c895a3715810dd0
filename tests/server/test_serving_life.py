"""A server from its start to its end: what it says before it is ready, while it is full, when a call fails, and when it stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_export.runtimes.server.application import create_app
from qwen_export.runtimes.server.http_server import HttpServer, address_of, drain, listening_socket
from qwen_export.runtimes.server.server_settings import ServerSettings
from qwen_export.runtimes.server.service import Service
from tests.support.live_server import LiveServer, live_server

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "def add(a, b):"}], "max_tokens": 8, "temperature": 0}
LONG = {**BODY, "max_tokens": 8_000, "ignore_eos": True, "stream": True}


@pytest.fixture
def small(demo_bundle: Path) -> Iterator[LiveServer]:
    """One slot, and room for one more."""
    with live_server(demo_bundle, ServerSettings(max_queue=1), slots=1, max_context=8192) as running:
        yield running


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert isinstance(error, dict) and error["message"].endswith(".")
    return error


def test_before_the_model_is_there() -> None:
    settings = ServerSettings()
    service = Service(settings)
    with listening_socket("127.0.0.1", 0) as listening:
        server = HttpServer(create_app(service), listening, settings)
        with httpx.Client(base_url=address_of(listening)) as client:
            assert client.get("/health").status_code == 503 and client.get("/version").json()["version"]
            for answer in (client.post(CHAT, json=BODY), client.get("/v1/models")):
                assert answer.status_code == 503 and error_of(answer)["code"] == "starting" and answer.headers["retry-after"]
            assert client.get("/metrics").status_code == 200
        server.close()


def test_a_full_queue(small: LiveServer) -> None:
    with httpx.Client(base_url=small.url, timeout=60) as client:
        with client.stream("POST", CHAT, json=LONG) as first, client.stream("POST", CHAT, json=LONG):
            held = first.iter_lines()
            next(held)
            for path, kind in ((CHAT, "rate_limit_error"), ("/v1/messages", "rate_limit_error")):
                answer = client.post(path, json=BODY)
                assert answer.status_code == 429 and error_of(answer)["type"] == kind and int(answer.headers["retry-after"]) >= 1
            assert client.get("/health").status_code == 200
            figures = client.get("/metrics").text
            assert 'vllm:admission_rejections_total{engine="0",model_name="demo",reason="queue_full"} 2.0' in figures
        while small.service.open_answers:
            time.sleep(0.01)
        assert client.post(CHAT, json=BODY).status_code == 200


def test_limits_of_time(demo_bundle: Path) -> None:
    settings = ServerSettings(queue_timeout_s=0.3, answer_timeout_s=2.0)
    with live_server(demo_bundle, settings, slots=1, max_context=8192) as running, httpx.Client(base_url=running.url, timeout=60) as client:
        with client.stream("POST", CHAT, json={**LONG, "n": 2, "max_tokens": 8_000}) as first:
            held = first.iter_lines()
            next(held)
            late = client.post(CHAT, json=BODY)
            assert late.status_code == 503 and error_of(late)["code"] == "queue_timeout"
            lines = [line for line in held if line]
        assert json.loads(lines[-2][6:])["error"]["code"] == "timeout" and lines[-1] == "data: [DONE]"


def test_a_call_that_fails_ends_its_requests_and_nothing_else(small: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine goes on, or /health fails."""
    from qwen_export.runtimes.decoding.bound_call import BoundCall

    queue, broken = BoundCall.queue, threading.Event()

    def failing(self: Any, *arguments: Any, **named: Any) -> Any:
        if broken.is_set():
            raise RuntimeError("the device is on fire")
        return queue(self, *arguments, **named)

    monkeypatch.setattr(BoundCall, "queue", failing)
    with httpx.Client(base_url=small.url, timeout=60) as client:
        with client.stream("POST", CHAT, json=LONG) as stream:
            lines = stream.iter_lines()
            next(lines)
            broken.set()
            last = [line for line in lines if line][-2:]
        assert last[1] == "data: [DONE]" and json.loads(last[0][6:])["error"]["type"] == "server_error"
        whole = client.post(CHAT, json=BODY)
        assert whole.status_code == 500 and whole.headers["x-should-retry"] == "false" and "Traceback" not in whole.text
        broken.clear()
        if client.get("/health").status_code == 200:
            assert client.post(CHAT, json=BODY).status_code == 200
        figures = client.get("/metrics").text
        assert 'finished_reason="error"' in figures


def test_answers_in_progress_are_finished(small: LiveServer) -> None:
    with httpx.Client(base_url=small.url, timeout=60) as client:
        with client.stream("POST", CHAT, json={**LONG, "max_tokens": 300}) as stream:
            held = stream.iter_lines()
            next(held)
            left: list[int] = []
            waiting = threading.Thread(target=lambda: left.append(drain(small.service, 60, threading.Event())))
            waiting.start()
            while small.service.phase != "stopping":
                time.sleep(0.001)
            refused = client.post(CHAT, json=BODY)
            assert refused.status_code == 503 and error_of(refused)["code"] == "stopping"
            assert client.get("/health").status_code == 503
            lines = [line for line in held if line]
        waiting.join()
        assert left == [0] and lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"


def test_what_is_not_finished_in_time_ends_with_an_error(small: LiveServer) -> None:
    with httpx.Client(base_url=small.url, timeout=60) as client, client.stream("POST", CHAT, json=LONG) as stream:
        held = stream.iter_lines()
        next(held)
        assert drain(small.service, 0.0, threading.Event()) == 1
        small.engine.close()
        lines = [line for line in held if line]
    assert json.loads(lines[-2][6:])["error"]["code"] == "stopping" and lines[-1] == "data: [DONE]"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_command_serves_until_a_signal(demo_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\nother\n")
    command = [sys.executable, "-m", "qwen_export", "serve", str(demo_bundle), "--port", "0", "--slots", "2", "--api-key-file", str(keys)]
    with subprocess.Popen([*command, "--served-model-name", "qwen"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("ready: "):
                break
        url = lines[-1].split()[1]
        assert "qwen" in lines[-1] and lines[0].startswith(url.removesuffix("/v1"))
        assert httpx.get(f"{url}/models").status_code == 401
        with httpx.Client(headers={"Authorization": "Bearer other"}, timeout=60) as client:
            assert client.get(f"{url}/models").json()["data"][0]["id"] == "qwen"
            body = {**LONG, "max_tokens": 200, "model": "qwen"}
            with client.stream("POST", f"{url}/chat/completions", json=body) as stream:
                held = stream.iter_lines()
                next(held)
                process.send_signal(signal.SIGTERM)
                assert [line for line in held if line][-1] == "data: [DONE]"
        process.communicate()
        assert process.returncode == 0


def test_an_address_in_use(small: LiveServer, demo_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from qwen_export.commands.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["serve", str(demo_bundle), "--port", str(small.port)])
    assert stopped.value.code == 1
    error = capfd.readouterr().err
    assert error.startswith("error: the address cannot be used") and "--port" in error and error.count("\n") == 1
