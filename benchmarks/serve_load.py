"""HTTP streams beside the engine without HTTP, alternating in one run, and answers under a load that does not wait: tables and a plot.

    python benchmarks/serve_load.py BUNDLE --streams 8,32 --new-tokens 128 --rates 2,4,8 --plot serve_load.png

Closed loop: N streams of the same requests, once through the engine alone (token ids, read by no one) and once over HTTP, from a client in
a process of its own. Open loop: requests arrive at random times, RATE a second on average, whatever the server does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from qwen_export.runtimes import Model, load
from qwen_export.runtimes.server.application import create_app
from qwen_export.runtimes.server.http_server import HttpServer, listening_socket
from qwen_export.runtimes.server.server_settings import ServerSettings
from qwen_export.runtimes.server.service import Service
from qwen_export.runtimes.serving.engine import Engine

_WORDS = ("def", "return", "class", "import", "value", "list", "of", "the", "sum", "a", "b", "print", "for", "in", "range", "self")
_POLL_S = 0.002


def bodies(count: int, words: int, new_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Requests whose prompts share nothing but the template."""
    chance = np.random.default_rng(seed)
    return [
        {
            "messages": [{"role": "user", "content": " ".join(chance.choice(_WORDS, words))}],
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "enable_thinking": False,
        }
        for _ in range(count)
    ]


def over_http(port: int, given: list[dict[str, Any]], starts: list[float] | None = None) -> list[dict[str, Any]]:
    plan = {"host": "127.0.0.1", "port": port, "bodies": given, "starts": starts}
    client = Path(__file__).parent / "http_streams.py"
    done = subprocess.run([sys.executable, client], input=json.dumps(plan), capture_output=True, text=True, check=True)
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    wrong = [answer["status"] for answer in answers if answer["status"] != 200]
    if wrong:
        print(f"{len(wrong)} of {len(answers)} requests were refused, the first with {wrong[0]}", file=sys.stderr)
    return [answer for answer in answers if answer["status"] == 200]


def through_engine(model: Model, engine: Engine, given: list[dict[str, Any]]) -> float:
    """Tokens per second while all streams answer: from the last first token to the first end. When prompts are read depends on when they
    arrive, which is not what HTTP costs."""
    from qwen_export.runtimes.structured.answer_options import AnswerOptions

    options = AnswerOptions(ignore_eos=True)
    prepared = [
        model.prepare_chat(
            body["messages"], sampling={"greedy": True}, max_new_tokens=body["max_tokens"], answer=options, enable_thinking=False
        )
        for body in given
    ]
    streams = [engine.submit(one.request) for one in prepared]

    def made() -> int:
        return sum(stream.statistics.new_tokens for stream in streams)

    while not all(stream.statistics.new_tokens for stream in streams):
        time.sleep(_POLL_S)
    began, before = time.perf_counter(), made()
    while not any(stream.statistics.finish for stream in streams):
        time.sleep(_POLL_S)
    speed = (made() - before) / (time.perf_counter() - began)
    while not all(stream.statistics.finish for stream in streams):
        time.sleep(_POLL_S)
    return speed


def http_speed(answers: list[dict[str, Any]]) -> float:
    """The same, as the client sees it."""
    began, ended = max(answer["arrivals"][0] for answer in answers), min(answer["arrivals"][-1] for answer in answers)
    if ended <= began:
        raise SystemExit("the first answer ended before the last one began: give more --new-tokens, or fewer --prompt-words")
    tokens = sum(answer["tokens"] / len(answer["arrivals"]) * sum(began < at <= ended for at in answer["arrivals"]) for answer in answers)
    return float(tokens / (ended - began))


def percentiles(values: Any) -> tuple[float, float]:
    found = np.percentile(np.asarray(values), [50, 99]) if len(values) else (np.nan, np.nan)
    return float(found[0]), float(found[1])


def latencies(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds to the first token and between two writes of a stream."""
    firsts = [1000 * (answer["arrivals"][0] - answer["sent"]) for answer in answers if answer["arrivals"]]
    gaps = [1000 * gap for answer in answers for gap in np.diff(answer["arrivals"])]
    first, between = percentiles(firsts), percentiles(gaps)
    return {"first_p50": first[0], "first_p99": first[1], "between_p50": between[0], "between_p99": between[1]}


def closed_loop(model: Model, engine: Engine, port: int, count: int, given: argparse.Namespace) -> dict[str, Any]:
    alone, http, ratios, answers = [], [], [], []
    for number in range(given.rounds + 1):  # the first warms up
        requests = bodies(count, given.prompt_words, given.new_tokens, number)
        speed = through_engine(model, engine, requests)
        came = over_http(port, bodies(count, given.prompt_words, given.new_tokens, 1000 + number))
        if number:
            alone.append(speed)
            http.append(http_speed(came))
            ratios.append(http[-1] / speed)
            answers += came
    return {"streams": count, "engine": median(alone), "http": median(http), "ratio": median(ratios), **latencies(answers)}


def open_loop(port: int, rate: float, given: argparse.Namespace) -> dict[str, Any]:
    count = max(2, int(rate * given.seconds))
    starts = np.cumsum(np.random.default_rng(7).exponential(1 / rate, count)).tolist()
    answers = over_http(port, bodies(count, given.prompt_words, given.new_tokens, 5000), starts)
    span = max(answer["arrivals"][-1] for answer in answers) - min(answer["sent"] for answer in answers)
    return {"rate": rate, "tokens": sum(answer["tokens"] for answer in answers) / span, **latencies(answers)}


def print_table(rows: list[dict[str, Any]], head: str, columns: tuple[tuple[str, str], ...]) -> None:
    print(head)
    for row in rows:
        print("  ".join(f"{row[name]:{form}}" for name, form in columns))


def draw(closed: list[dict[str, Any]], opened: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, rows, name, label in ((axes[0], closed, "streams", "streams at once"), (axes[1], opened, "rate", "requests per second")):
        if not rows:
            continue
        at = [row[name] for row in rows]
        for kind, color in (("first", "tab:blue"), ("between", "tab:orange")):
            axis.plot(at, [row[f"{kind}_p50"] for row in rows], "o-", color=color, label=f"{kind}, median")
            axis.plot(at, [row[f"{kind}_p99"] for row in rows], "o--", color=color, label=f"{kind}, 99th percentile")
        axis.set(xlabel=label, ylabel="ms", yscale="log", title="closed loop" if name == "streams" else "open loop")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--streams", default="8,32")
    parser.add_argument("--rates", default="", help="requests per second, comma-separated; empty: without the second table")
    parser.add_argument("--seconds", type=float, default=10, help="of the open loop")
    parser.add_argument("--prompt-words", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--speculate", default="off")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    counts = [int(part) for part in given.streams.split(",")]
    rates = [float(part) for part in given.rates.split(",") if part]
    settings = ServerSettings(max_queue=10_000)
    model = load(given.bundle, threads=given.threads, speculate=given.speculate, max_context=4 * given.prompt_words + given.new_tokens + 64)
    closed, opened = [], []
    for slots in counts:
        service = Service(settings)
        with listening_socket("127.0.0.1", 0) as listening, Engine.of(model, slots, prefix_memory=0) as engine:
            server = HttpServer(create_app(service), listening, settings)
            service.start(model, engine)
            port = listening.getsockname()[1]
            closed.append(closed_loop(model, engine, port, slots, given))
            if slots == counts[-1]:
                opened = [open_loop(port, rate, given) for rate in rates]
            server.close()
    times = "first p50  first p99  between p50  between p99"
    columns = (("first_p50", "9.1f"), ("first_p99", "9.1f"), ("between_p50", "11.2f"), ("between_p99", "11.2f"))
    print_table(
        closed,
        f"streams  engine tok/s  HTTP tok/s  ratio  {times} (ms)",
        (("streams", "7"), ("engine", "12.1f"), ("http", "10.1f"), ("ratio", "5.2f"), *columns),
    )
    if opened:
        print()
        print_table(opened, f"requests/s    tok/s  {times} (ms)", (("rate", "10.1f"), ("tokens", "7.1f"), *columns))
    if given.plot:
        draw(closed, opened, given.plot)


if __name__ == "__main__":
    main()
