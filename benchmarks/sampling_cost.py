"""What choosing one token costs, by sampling parameters, on a row of logits of the family's size: `python benchmarks/sampling_cost.py`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from qwen_export.runtimes import SamplingParams
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.sampling.token_history import TokenHistory

ROWS, TOKENS, REPEATS = 248_320, 248_077, 30
OPTIONS: tuple[dict[str, Any], ...] = (
    {"greedy": True},
    {"top_k": 20, "top_p": 0.95},
    {"top_k": 20, "top_p": 0.95, "presence_penalty": 1.5},
    {"top_k": 20, "top_p": 0.95, "no_repeat_ngram_size": 4, "suppress_tokens": tuple(range(100))},
    {"top_p": 0.95},
    {},
)


def main() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(ROWS).astype(np.float32)
    logits[rng.integers(0, ROWS, 100)] += rng.random(100).astype(np.float32) * 20
    history = TokenHistory(range(2000))
    for token in rng.integers(0, ROWS, 2000).tolist():
        history.push(token)
    for options in OPTIONS:
        sampler = Sampler(SamplingParams(seed=0, **options), TOKENS)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            sampler.sample(logits, history)
            times.append(time.perf_counter() - start)
        shown = {name: len(value) if isinstance(value, tuple) else value for name, value in options.items()}
        print(f"{np.median(times) * 1e6:8.0f} us  {shown or 'no filter'}")


if __name__ == "__main__":
    main()
