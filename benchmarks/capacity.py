"""Does a decode step cost more when the caches have room for more? A copy of a cache or a state between steps would show here.

    python benchmarks/capacity.py BUNDLE [--max-context 2048,8192,32768,131072,262144]

Each capacity runs in a process of its own: 600 tokens of prompt, then 48 steps. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np

PROMPT_TOKENS, STEPS = 600, 48


def measure(bundle: str, capacity: int) -> dict[str, float]:
    """Median milliseconds of a step, and the process's peak memory in MB."""
    from qwen_export.runtimes import load
    from qwen_export.runtimes.benchmark import peak_rss_mb

    model = load(bundle, max_context=capacity)
    decoder = model.decoder()
    vocabulary = model.manifest.model["vocab_size"]
    decoder.prefill(np.random.default_rng(0).integers(0, vocabulary, PROMPT_TOKENS).tolist())
    times = []
    for token in range(STEPS):
        started = time.perf_counter()
        decoder.step([token])
        times.append(time.perf_counter() - started)
    return {"step_ms": float(np.median(times)) * 1e3, "peak_rss_mb": peak_rss_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--max-context", default="2048,8192,32768,131072,262144")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.bundle, arguments.one)))
        return
    print("| --max-context | ms per step | peak RSS, MB |")
    print("|---|---|---|")
    for capacity in map(int, arguments.max_context.split(",")):
        command = [sys.executable, __file__, arguments.bundle, "--one", str(capacity)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {capacity} | {row['step_ms']:.2f} | {row['peak_rss_mb']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
