"""Prompts and steps of one bundle with each set of CPU kernels, interleaved: QWEN_EXPORT_CPU_SET chooses, a process each.

    .venv/bin/python benchmarks/cpu_sets.py BUNDLE [--sets avx512,amx] [--prompt-tokens 512,2048] [--rounds 2]

A set may be amx_bf16: amx with the option of bf16 tiles, for weights in BF16.

CPU time of one thread, the least of all rounds, so that other work on the machine counts as little as it can; read the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from qwen_export.runtimes import load

STEPS = 16


def measure(bundle: Path, counts: list[int]) -> dict[str, float]:
    """CPU seconds per token of prompts by length, and per step behind the shortest."""
    decoder = load(bundle, threads=1).decoder()
    rng = np.random.default_rng(0)
    decoder.prefill([1, 2, 3])
    result = {}
    for count in sorted(counts, reverse=True):
        ids = rng.integers(0, 1000, count).tolist()
        decoder.reset()
        begun = time.process_time()
        decoder.prefill(ids)
        result[f"prompt of {count}"] = (time.process_time() - begun) / count
    steps = []
    for _ in range(STEPS):
        begun = time.process_time()
        decoder.step([5])
        steps.append(time.process_time() - begun)
    return result | {"step": min(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sets", default="avx512,amx")
    parser.add_argument("--prompt-tokens", default="512,2048")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure(options.bundle, [int(count) for count in options.prompt_tokens.split(",")])))
        return
    sets = options.sets.split(",")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sets}
    command = [sys.executable, __file__, str(options.bundle), "--once", "--prompt-tokens", options.prompt_tokens]
    for _ in range(options.rounds):
        for name in sets:
            kernels, option, _ = name.partition("_bf16")
            environment = os.environ | {"QWEN_EXPORT_CPU_SET": kernels, "QWEN_EXPORT_CPU_BF16_TILES": "1" if option else "0"}
            runs[name].append(json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout))
    print("| | " + " | ".join(f"{name}, ms of CPU a token" for name in sets) + f" | {sets[0]} / {sets[-1]} |")
    print("|---" * (len(sets) + 2) + "|")
    for what in runs[sets[0]][0]:
        best = [min(run[what] for run in runs[name]) * 1e3 for name in sets]
        print(f"| {what} | " + " | ".join(f"{value:.2f}" for value in best) + f" | {best[0] / best[-1]:.2f} |")


if __name__ == "__main__":
    main()
