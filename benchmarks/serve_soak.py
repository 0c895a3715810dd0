"""A server under mixed load for minutes: its memory, and whether every client that stayed got its answer.

    qwen-export serve BUNDLE --port 8000 & python benchmarks/serve_soak.py http://127.0.0.1:8000 --pid PID --minutes 30

Clients ask in all protocols, whole and streamed, with long and short prompts, with tools and forms; some leave in the middle. A line per
minute has the resident memory of the process, and counts.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from typing import Any

import httpx
import psutil

_TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}}}
_FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"ok": {"type": "boolean"}}}}}
_LEAVES = 0.2


def request(chance: random.Random) -> tuple[str, dict[str, Any]]:
    text = " ".join(chance.choice(("def", "add", "list", "of", "values", "return", "class")) for _ in range(chance.choice((3, 30, 300))))
    body: dict[str, Any] = {"max_tokens": chance.choice((1, 16, 128)), "stream": chance.random() < 0.6}
    kind = chance.choice(("chat", "chat", "tools", "form", "text", "responses", "messages"))
    if kind == "text":
        return "/v1/completions", {**body, "prompt": text}
    if kind == "responses":
        return "/v1/responses", {"input": text, "max_output_tokens": body["max_tokens"], "stream": body["stream"]}
    body["messages"] = [{"role": "user", "content": text}]
    if kind == "messages":
        return "/v1/messages", body
    extra = {"tools": {"tools": [_TOOL]}, "form": {"response_format": _FORM}}.get(kind, {"n": chance.choice((1, 1, 2))})
    return "/v1/chat/completions", {**body, **extra}


async def client(http: httpx.AsyncClient, chance: random.Random, until: float, counts: Counter[str]) -> None:
    while time.monotonic() < until:
        path, body = request(chance)
        leaves = chance.random() < _LEAVES
        try:
            async with http.stream("POST", path, json=body) as answer:
                counts[str(answer.status_code)] += 1
                read = 0
                async for piece in answer.aiter_bytes():
                    read += len(piece)
                    if leaves and read > 400:
                        counts["left"] += 1
                        break
                if not read:
                    counts["empty"] += 1
        except httpx.HTTPError as error:
            counts[type(error).__name__] += 1
        await asyncio.sleep(chance.expovariate(5))


async def run(url: str, pid: int, minutes: float, clients: int) -> None:
    counts: Counter[str] = Counter()
    until = time.monotonic() + 60 * minutes
    process = psutil.Process(pid)
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        tasks = [asyncio.create_task(client(http, random.Random(number), until, counts)) for number in range(clients)]
        began = time.monotonic()
        while not all(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=60)
            memory = process.memory_info().rss / (1 << 20)
            seen = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            print(f"{(time.monotonic() - began) / 60:5.1f} min  {memory:8.1f} MiB  {process.num_fds():4} files  {seen}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=24)
    given = parser.parse_args()
    asyncio.run(run(given.url, given.pid, given.minutes, given.clients))


if __name__ == "__main__":
    main()
