"""Speed of an engine with several streams beside the bare decoder loop, alternating in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from qwen_export.runtimes.decoding.generation import Request
from qwen_export.runtimes.model import Model
from qwen_export.runtimes.sampling.sampler import Sampler, SamplingParams
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.serving.token_stream import TokenStream

Say = Callable[[str], None]
_POLL_S = 0.002


def measure_streams(
    model: Model,
    streams: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    say: Say,
    *,
    cache_memory: int | None = None,
) -> list[dict[str, Any]]:
    """For each number of streams: greedy tokens per second of all together, bare (steps of a decoder of so many slots, no engine) and
    through the engine, and seconds to the first token, of prompts of random tokens that arrive at once. Medians of `rounds`;
    `cache_bytes` is what states and caches of the engine took at the end of an answer."""
    return [_streams(model, count, prompt_tokens, new_tokens, rounds, say, cache_memory) for count in streams]


def _streams(
    model: Model, count: int, prompt_tokens: int, new_tokens: int, rounds: int, say: Say, cache_memory: int | None
) -> dict[str, Any]:
    chance = np.random.default_rng(0)
    prompts = chance.integers(0, model.manifest.model["vocab_size"], (count, prompt_tokens)).tolist()
    bare, through, ratios, firsts, lasts, hosts = [], [], [], [], [], []
    used = 0
    with Engine.of(model, count, cache_memory=cache_memory, prefix_memory=0) as engine:
        for number in range(rounds + 1):  # the first binds and records
            say(f"{count} streams, round {number} of {rounds}")
            alone = _bare(model, prompts, new_tokens)
            steps, host = engine.statistics.steps, engine.statistics.host_s
            speed, seconds, used = through_engine(engine, prompts, new_tokens)
            if number:
                bare.append(alone)
                through.append(speed)
                ratios.append(speed / alone)
                firsts.append(median(seconds))
                lasts.append(max(seconds))
                hosts.append((engine.statistics.host_s - host) / max(1, engine.statistics.steps - steps))
    return {
        "streams": count,
        "bare_tok_per_s": median(bare),
        "engine_tok_per_s": median(through),
        "ratio": median(ratios),
        "first_token_s": median(firsts),
        "last_first_token_s": median(lasts),
        "host_s_per_step": median(hosts),
        "cache_bytes": used,
    }


def _bare(model: Model, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    decoder = model.decoder(len(prompts))
    tokens = [int(decoder.prefill(ids, slot).argmax()) for slot, ids in enumerate(prompts)]
    rows = decoder.step(tokens)
    started = time.perf_counter()
    for _ in range(new_tokens - 1):
        rows = decoder.step(rows.argmax())
    return len(prompts) * (new_tokens - 1) / (time.perf_counter() - started)


def through_engine(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, list[float], int]:
    """Greedy tokens per second while all streams answer, seconds to the first token of each, and bytes of states and caches in use."""
    greedy = SamplingParams(greedy=True)
    # Without a limit: streams that began first must not end before all have begun.
    streams = [engine.submit(Request(ids, Sampler(greedy), ())) for ids in prompts]
    while not all(stream.statistics.new_tokens for stream in streams):
        time.sleep(_POLL_S)
    began, before = time.perf_counter(), _made(streams)
    ended, after = began, before
    while after - before < len(streams) * new_tokens and not any(stream.statistics.finish for stream in streams):
        time.sleep(_POLL_S)
        made = _made(streams)
        if made != after:
            ended, after = time.perf_counter(), made
    used = engine.statistics.cache_bytes
    for stream in streams:
        stream.cancel()
    for stream in streams:
        for _ in stream:
            pass
    span = ended - began
    return (after - before) / span if span else 0.0, [stream.statistics.first_token_s for stream in streams], used


def _made(streams: Sequence[TokenStream]) -> int:
    return sum(stream.statistics.new_tokens for stream in streams)
