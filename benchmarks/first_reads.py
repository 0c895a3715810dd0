"""The first prompt of a length on a GPU beside later ones of the same length, with prompts of every size read beforehand and without.

    python benchmarks/first_reads.py BUNDLE [--tokens 37,129,300,700,1500,2048] [--rounds 3]

Each column is a process that loads the bundle, reads 8 tokens and makes a step. A text of each length is then read several times, each
time as the first of its sequence.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measured_process import run_measured

from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.prompt_sizes import read_every_size
from qwen_export.runtimes.memory.cuda_driver import memory_info


def child(bundle: Path, tokens: list[int], rounds: int, *, prepared: bool) -> dict[str, Any]:
    chance = np.random.default_rng(0)
    with load(bundle, max_context=max(tokens) + 4096, speculate="off") as model:
        decoder, vocabulary = model.decoder(), model.manifest.model["vocab_size"]
        decoder.prefill(chance.integers(0, vocabulary, 8).tolist())
        decoder.step([0])
        free, began = memory_info()[0], time.perf_counter()
        if prepared:
            read_every_size(decoder)
        prepared_s, reads = time.perf_counter() - began, []
        for count in tokens:
            text, times = chance.integers(0, vocabulary, count).tolist(), []
            for _ in range(rounds + 1):
                decoder.reset()
                began = time.perf_counter()
                decoder.prefill(text)
                times.append(1000 * (time.perf_counter() - began))
            reads.append((times[0], median(times[1:])))
        return {"prepared_ms": 1000 * prepared_s, "reads": reads, "memory_mb": (free - memory_info()[0]) >> 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", default="37,129,300,700,1500,2048", help="in this order")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=("plain", "prepared"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    tokens = [int(part) for part in given.tokens.split(",")]
    if given.child:
        print(json.dumps(child(given.bundle, tokens, given.rounds, prepared=given.child == "prepared")))
        return
    plain, prepared = (
        json.loads(run_measured([sys.executable, *sys.argv, "--child", name]).stdout.splitlines()[-1]) for name in ("plain", "prepared")
    )
    print("| tokens | first read, ms | first read after every size, ms | later reads, ms |\n|---|---|---|---|")
    for count, (first, _), (after, later) in zip(tokens, plain["reads"], prepared["reads"], strict=True):
        print(f"| {count} | {first:.1f} | {after:.1f} | {later:.1f} |")
    print(f"reading every size: {prepared['prepared_ms']:.0f} ms; memory after all: {plain['memory_mb']} and {prepared['memory_mb']} MB")


if __name__ == "__main__":
    main()
