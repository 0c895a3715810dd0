"""Streams of /v1/chat/completions, read by one event loop with as little work as possible: a client must not be what is measured.

    python benchmarks/http_streams.py < plan.json > times.json

A plan: {"host", "port", "bodies": [...], "starts": [seconds, ...] or null for all at once}.
The times: for each body the seconds at which it was sent and at which each piece with text arrived, and how many tokens it had.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any

_TOKENS = re.compile(rb'"completion_tokens": (\d+)')
_TEXT = (b'"content": "', b'"reasoning_content": "')
_FIRST_CHUNK = b'"role": "assistant"'


class Reader(asyncio.Protocol):
    """One request on one connection."""

    def __init__(self, body: bytes, host: str, done: asyncio.Future[None]) -> None:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._request = head.encode() + b"Connection: close\r\n\r\n" + body
        self._done = done
        self._transport: asyncio.Transport | None = None
        self.sent = 0.0
        self.arrivals: list[float] = []
        self.status, self.tokens = 0, 0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.status:
            self.status = int(data[9:12])
        if data.count(_TEXT[0]) + data.count(_TEXT[1]) > data.count(_FIRST_CHUNK):
            self.arrivals.append(now)
        self._tail = (self._tail + data)[-1000:]

    def connection_lost(self, error: Exception | None) -> None:
        found = _TOKENS.findall(self._tail)
        self.tokens = int(found[-1]) if found else 0
        if not self._done.done():
            self._done.set_result(None)


async def _one(plan: dict[str, Any], body: bytes) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    _, reader = await loop.create_connection(lambda: Reader(body, plan["host"], done), plan["host"], plan["port"])
    await done
    return {"sent": reader.sent, "arrivals": reader.arrivals, "status": reader.status, "tokens": reader.tokens}


async def run(plan: dict[str, Any]) -> list[dict[str, Any]]:
    bodies = [json.dumps(body).encode() for body in plan["bodies"]]
    starts = plan.get("starts") or [0.0] * len(bodies)
    began = time.perf_counter()

    async def later(start: float, body: bytes) -> dict[str, Any]:
        await asyncio.sleep(max(0.0, start - (time.perf_counter() - began)))
        return await _one(plan, body)

    return list(await asyncio.gather(*(later(start, body) for start, body in zip(starts, bodies, strict=True))))


if __name__ == "__main__":
    json.dump(asyncio.run(run(json.load(sys.stdin))), sys.stdout)
