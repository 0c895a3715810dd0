"""Clients that are slow, broken or abusive take nothing from those beside them, and leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_export.runtimes.server.server_settings import ServerSettings
from tests.support.live_server import LiveServer, live_server

BODY = {"messages": [{"role": "user", "content": "def add(a, b):"}], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
ABUSERS = 1000
LIMITS = ServerSettings(
    max_body=100_000, max_headers=8_000, header_timeout_s=1.0, body_timeout_s=1.0, write_timeout_s=1.0, max_queue=64, keep_alive_s=0.5
)


@pytest.fixture(scope="module")
def guarded(demo_bundle: Path) -> Iterator[LiveServer]:
    with live_server(demo_bundle, LIMITS) as running:
        yield running


def request(body: Any, length: int | None = None, headers: str = "") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = len(data) if length is None else length
    fields = f"Host: x\r\nContent-Type: application/json\r\n{headers}Content-Length: {size}\r\n"
    return f"POST /v1/chat/completions HTTP/1.1\r\n{fields}\r\n".encode() + data


LONG = {**BODY, "max_tokens": 600, "stream": True}
KINDS: dict[str, bytes] = {
    "nothing": b"",
    "half a line": b"POST /v1/chat/com",
    "half of the headers": b"POST /v1/chat/completions HTTP/1.1\r\nX: " + b"a" * 100,
    "endless headers": b"GET /health HTTP/1.1\r\n" + b"X-Y: " + b"a" * 70_000,
    "no HTTP": b"\x16\x03\x01\x02\x00" * 20 + b"\r\n\r\n",
    "half a body": request(BODY, length=5_000),
    "a body too large": request(b"x" * 10, length=200_000),
    "no JSON": request(b"{" * 5_000),
    "deep JSON": request(b"[" * 90_000),
    "a wrong encoding": request(b"\xff\xfe\x00", headers="Content-Encoding: gzip\r\n"),
    "two lengths": b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    "chunks that lie": b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
    "a path upwards": b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "an upgrade": b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    "a stream that is left": request(LONG),
    "a stream that is not read": request(LONG),
    "an answer that is left": request({**LONG, "stream": False}),
    "a queue of requests": request({**BODY, "max_tokens": 1}) * 3,
}


async def abuse(port: int, kind: str, chance: random.Random) -> bytes:
    """Returns the beginning of what the server says."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    try:
        data = KINDS[kind]
        cut = chance.randrange(len(data) + 1)
        writer.write(data[:cut])
        await asyncio.sleep(chance.random() / 20)
        writer.write(data[cut:])
        if kind == "a stream that is not read":
            await asyncio.sleep(0.5)
            return b""
        async with asyncio.timeout(0.3):
            return await reader.read(200)
    except (TimeoutError, ConnectionError):
        return b""
    finally:
        if chance.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """The text of a stream, asked for again while the queue is full."""
    while True:
        async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                await asyncio.sleep(0.05)
                continue
            assert answer.status_code == 200
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line[6:]) for line in lines[:-1]]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


async def settled(server: LiveServer) -> None:
    """Wait until no answer is left."""
    async with asyncio.timeout(30):
        while server.service.open_answers or server.engine.statistics.running:
            await asyncio.sleep(0.02)


def test_a_thousand_of_them_cost_no_other_client_a_token(guarded: LiveServer) -> None:
    async def run() -> None:
        chance = random.Random(5)
        kinds = list(KINDS)
        async with httpx.AsyncClient(base_url=guarded.url, timeout=60) as client:
            alone = await ask(client, BODY)
            gate = asyncio.Semaphore(100)

            async def one(number: int) -> None:
                async with gate:
                    said = await abuse(guarded.port, kinds[number % len(kinds)], chance)
                    assert b"500" not in said[:15] and b"root:" not in said and b"Traceback" not in said, said

            abusers = [asyncio.create_task(one(number)) for number in range(ABUSERS)]
            heard = 0
            while not all(task.done() for task in abusers):
                assert await ask(client, BODY) == alone
                heard += 1
            await asyncio.gather(*abusers)
            assert heard > 3
            await settled(guarded)
            assert (await client.get("/health")).status_code == 200
            assert await ask(client, BODY) == alone

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(guarded: LiveServer, stream: bool) -> None:
    async def run() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", guarded.port)
        writer.write(request({**LONG, "stream": stream}))
        async with asyncio.timeout(20):
            while not guarded.engine.statistics.running:
                await asyncio.sleep(0.005)
        writer.transport.abort()
        await settled(guarded)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("a body too large", 413),
        ("no JSON", 400),
        ("deep JSON", 400),
        ("a wrong encoding", 415),
        ("half a body", 408),
        ("endless headers", 431),
    ],
)
def test_what_is_over_a_limit_is_told_so(guarded: LiveServer, kind: str, status: int) -> None:
    async def run() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", guarded.port)
        writer.write(KINDS[kind])
        async with asyncio.timeout(10):
            said = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return said

    assert asyncio.run(run()).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("kind", ["nothing", "half a line", "half of the headers"])
def test_a_connection_without_a_request_is_closed(guarded: LiveServer, kind: str) -> None:
    async def run() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", guarded.port)
        writer.write(KINDS[kind])
        async with asyncio.timeout(10):
            return await reader.read()

    assert asyncio.run(run()) == b""


def test_a_reader_that_takes_nothing_is_cut_off(demo_bundle: Path) -> None:
    """Its tokens wait as ids, and its connection is dropped once it has taken nothing for a while."""
    with live_server(demo_bundle, LIMITS, max_context=8192) as slow:

        async def run() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", slow.port, limit=1024)
            writer.transport.get_extra_info("socket").setsockopt(1, 8, 4096)
            writer.write(request({**LONG, "max_tokens": 8_000, "n": 4, "logprobs": True, "top_logprobs": 20}))
            await reader.read(10)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            async with asyncio.timeout(60):
                while slow.service.open_answers:
                    await asyncio.sleep(0.05)
            await settled(slow)
            writer.transport.abort()

        asyncio.run(run())


def test_silence_is_filled_with_comments(demo_bundle: Path) -> None:
    settings = ServerSettings(keep_alive_s=0.1)
    path = "/v1/chat/completions"
    with live_server(demo_bundle, settings, slots=1, max_context=8192) as busy, httpx.Client(base_url=busy.url, timeout=60) as client:
        long, short = {**LONG, "max_tokens": 8_000}, {**BODY, "stream": True}
        with client.stream("POST", path, json=long) as first, client.stream("POST", path, json=short) as second:
            held = first.iter_lines()
            next(held)
            lines = second.iter_lines()
            while not next(lines).startswith(": keep-alive"):
                pass
