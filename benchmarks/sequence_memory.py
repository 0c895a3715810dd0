"""What a sequence really takes: resident memory of the process while slots fill, beside the figures of `inspect` without drafts.

python benchmarks/sequence_memory.py BUNDLE --slots 1,4,16 --tokens 512,2048
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator

import psutil

from qwen_export.bundles.bundle_summary import inspect_bundle
from qwen_export.runtimes import load
from qwen_export.runtimes.model import Model

MIB = 1 << 20


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def rows(model: Model, slots: list[int], tokens: list[int], computed: dict[str, int]) -> Iterator[str]:
    """A line per number of slots and of tokens: what was measured a sequence, and what was computed."""
    for count in slots:
        decoder = model.decoder(count)
        # Each slot begins with what every call needs anyway.
        decoder.prefill([1] * decoder.chunk, 0)
        decoder.reset(0)
        before = resident()
        for length in tokens:
            for slot in range(count):
                decoder.prefill([1] * (length - decoder.sequences[slot].length), slot)
            took = (resident() - before) / count
            expected = computed["state_bytes"] + length * (computed["token_bytes"] - computed["draft_token_bytes"])
            yield f"{count:5} {length:7} {took / MIB:14.2f} {expected / MIB:14.2f}"
        del decoder


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("bundle")
    arguments.add_argument("--slots", type=numbers, default=[1, 4, 16])
    arguments.add_argument("--tokens", type=numbers, default=[512, 2048, 8000])
    given = arguments.parse_args()
    computed = inspect_bundle(given.bundle)["sequence"]
    with load(given.bundle, speculate="off") as model:
        print("slots  tokens   measured MiB   computed MiB")
        for line in rows(model, given.slots, given.tokens, computed):
            print(line)


if __name__ == "__main__":
    main()
