"""Streams of an engine beside the bare decoder loop: table and plot.

    python benchmarks/streams.py BUNDLE --streams 1,8,32,128 --prompt-tokens 128 --new-tokens 256 --plot streams.png

The same as `qwen-export bench BUNDLE --streams ...`, and also the longest time between two tokens while a long prompt is read.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np

from qwen_export.commands.bench import streams_text
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.generation import Request
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.serving.streams_benchmark import measure_streams

GREEDY = SamplingParams(greedy=True)


def stall(model: Model, streams: int, long_prompt: int) -> tuple[float, float, float]:
    """Seconds between two tokens of `streams` answers: the median alone, and the median and the 95th percentile while a prompt of
    `long_prompt` tokens is read."""
    chance = np.random.default_rng(1)
    vocabulary = model.manifest.model["vocab_size"]

    def request(tokens: int, new: int | None) -> Request:
        return Request(chance.integers(0, vocabulary, tokens).tolist(), Sampler(GREEDY), (), new)

    with Engine.of(model, streams + 1, prefix_memory=0) as engine:
        answers = [engine.submit(request(16, None)) for _ in range(streams)]
        watched = answers[0]
        times = []
        for _ in range(60):
            next(watched)
            times.append(time.perf_counter())
        alone = median(np.diff(times[10:]))
        late = engine.submit(request(long_prompt, 1))
        times = [time.perf_counter()]
        while not late.statistics.finish:
            next(watched)
            times.append(time.perf_counter())
        for answer in answers:
            answer.cancel()
    gaps = np.diff(times)
    return float(alone), float(np.median(gaps)), float(np.percentile(gaps, 95))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--long-prompt", type=int, default=0, help="0: without the second table")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--speculate", default="off")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    counts = [int(part) for part in given.streams.split(",")]
    context = max(given.prompt_tokens, 4 * given.long_prompt) + 8 * given.new_tokens
    model = load(given.bundle, threads=given.threads, speculate=given.speculate, max_context=context)
    rows = measure_streams(model, counts, given.prompt_tokens, given.new_tokens, given.rounds, lambda line: None)
    print(streams_text(rows))
    if given.long_prompt:
        print("\nstreams  between tokens  median while a prompt is read  95th percentile")
        for count in counts:
            alone, middle, high = stall(model, count, given.long_prompt)
            print(f"{count:7}  {1000 * alone:11.2f} ms  {middle / alone:17.2f} x of that  {high / alone:10.2f} x")
    if given.plot:
        from qwen_export.commands.streams_plot import draw_streams

        draw_streams(rows, given.plot)


if __name__ == "__main__":
    main()
