"""examples/deploy/ray_serve.py on a cluster of one machine: it streams, scales, loses a replica under load, and drains.

QWEN_EXPORT_RAY_PYTHON names a Python with ray[serve], the extra `serve` and a backend; by default it is the one that runs the tests.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen_export.runtimes import SamplingParams, load

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("QWEN_EXPORT_RAY_PYTHON", sys.executable)
PATIENCE_S = 120
TOKENS = 400
MESSAGES = [{"role": "user", "content": "def add(a, b):"}]

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(subprocess.run([PYTHON, "-c", "import ray.serve"], capture_output=True).returncode != 0, reason="no ray[serve]"),
]


@dataclass
class Cluster:
    port: int
    driver: subprocess.Popen[str]

    def deploy(self, least: int, most: int) -> None:
        """Set the bounds of replicas, and wait until they hold."""
        assert self.driver.stdin is not None and self.driver.stdout is not None
        self.driver.stdin.write(f"{least} {most}\n")
        self.driver.stdin.flush()
        for line in self.driver.stdout:
            if line.startswith("deployed"):
                return
        raise AssertionError("the driver has ended")

    def replicas(self) -> set[int]:
        """Process ids."""
        found = psutil.Process(self.driver.pid).children(recursive=True)
        return {process.pid for process in found if _title(process).startswith("ray::ServeReplica:qwen")}

    def until(self, condition: Any) -> None:
        for _ in range(PATIENCE_S * 2):
            if condition():
                return
            time.sleep(0.5)
        raise AssertionError("it does not come about")

    def answer(self) -> tuple[str, bool]:
        """The text of a streamed answer, and whether it came to its end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        body = {
            "messages": MESSAGES,
            "temperature": 0,
            "max_tokens": TOKENS,
            "stream": True,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        text = ""
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    for choice in json.loads(line[6:]).get("choices", ()):
                        text += choice["delta"].get("content") or ""
                elif line.startswith(b"data: [DONE]"):
                    return text, True
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        return text, False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def cluster(demo_bundle: Path) -> Iterator[Cluster]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = f"{ROOT}{os.pathsep}{ROOT / 'examples' / 'deploy'}"
    driver = subprocess.Popen(
        [PYTHON, str(ROOT / "tests" / "support" / "ray_driver.py"), str(demo_bundle), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "RAY_DISABLE_USAGE_STATS": "1"},
    )
    try:
        yield Cluster(port, driver)
    finally:
        assert driver.stdin is not None
        driver.stdin.close()
        try:
            driver.wait(PATIENCE_S)
        finally:
            driver.kill()


@pytest.fixture(scope="module")
def expected(demo_bundle: Path) -> str:
    with load(demo_bundle) as model:
        return "".join(model.stream(MESSAGES, enable_thinking=False, sampling=SamplingParams(greedy=True), max_new_tokens=TOKENS))


class Load:
    """Asks with so many clients at once until it is stopped; `results` are all answers."""

    def __init__(self, cluster: Cluster, clients: int) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self.results: list[tuple[str, bool]] = []
        self._clients: list[Future[None]] = [self._pool.submit(self._ask, cluster) for _ in range(clients)]

    def _ask(self, cluster: Cluster) -> None:
        while not self._stop.is_set():
            self.results.append(cluster.answer())

    def end(self) -> list[tuple[str, bool]]:
        self._stop.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()
        return self.results


def test_load_starts_another_replica(cluster: Cluster, expected: str) -> None:
    cluster.deploy(1, 2)
    assert cluster.answer() == (expected, True)
    assert len(cluster.replicas()) == 1
    load = Load(cluster, 8)
    cluster.until(lambda: len(cluster.replicas()) == 2)
    assert set(load.end()) == {(expected, True)}


def test_a_replica_that_dies_takes_no_other_answer_with_it(cluster: Cluster, expected: str) -> None:
    cluster.deploy(2, 2)
    before = cluster.replicas()
    load = Load(cluster, 8)
    cluster.until(lambda: len(load.results) >= 8)
    psutil.Process(min(before)).kill()
    cluster.until(lambda: len(cluster.replicas() - {min(before)}) == 2)
    made = len(load.results)
    cluster.until(lambda: len(load.results) >= made + 8)
    results = load.end()
    lost = [text for text, whole in results if not whole]
    assert len(lost) <= 8, "more than the clients that were there at that time"
    assert all(expected.startswith(text) for text in lost)
    assert {text for text, whole in results if whole} == {expected}
    assert cluster.answer() == (expected, True)


def test_a_replica_that_has_to_go_finishes_its_answers(cluster: Cluster, expected: str) -> None:
    cluster.deploy(2, 2)
    load = Load(cluster, 8)
    cluster.until(lambda: len(load.results) >= 4)
    cluster.deploy(1, 1)
    cluster.until(lambda: len(cluster.replicas()) == 1)
    assert set(load.end()) == {(expected, True)}
