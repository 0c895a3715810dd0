"""What the precision of attention caches costs and brings on the CPU: held-out perplexity, memory, and the rate of steps behind a context.

    .venv/bin/python benchmarks/cache_table.py [--checkpoint examples/demo-dense] [--windows 16] [--length 2048] [--speed 2048,8192]

Perplexity and KL as in quantization_table.py, beside caches in fp32. "bytes" are those of 1000 tokens of a sequence, draft head included
where there is one. With --speed: microseconds of the attention of one layer of the 0.8B for a step behind so many tokens, as
attention_cpu.py takes them, beside fp32; all formats alternate in one run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from attention_cpu import Case, microseconds
from quantization_table import ROOT, Held, held_out

from qwen_export import build
from qwen_export.bundles.bundle_summary import inspect_bundle
from qwen_export.cache_formats import CACHE_PRECISIONS

HEADS = (8, 2, 256, 64)
"""Of the 0.8B: query heads, key heads, values of a head, values that turn."""


def quality(checkpoint: Path, work: Path, windows: int, length: int) -> None:
    plain = build(checkpoint, work / "fp32", mtp=False)
    held = Held(plain, held_out(plain, windows, length))
    print(f"{checkpoint.name}: {windows} windows of {length} tokens\n")
    print("| caches | bytes of 1000 tokens | perplexity | change %       | KL        | same token % |")
    print("| ------ | -------------------- | ---------- | -------------- | --------- | ------------ |")
    for kept in ("fp32", *CACHE_PRECISIONS):
        bundle = plain if kept == "fp32" else build(checkpoint, work / kept, cache_precision=kept, mtp=False)
        row = held.measure(kept, bundle)
        taken = 1000 * inspect_bundle(bundle)["sequence"]["token_bytes"]
        change, same = f"{row.change:+.3f} ± {row.error:.3f}", 100 * row.same_token
        print(f"| {kept:6} | {taken:20} | {row.perplexity:10.3f} | {change:14} | {row.kl:9.1e} | {same:12.1f} |", flush=True)


def speed(pasts: list[int], threads: int) -> None:
    formats = ("fp32", *CACHE_PRECISIONS)
    print(
        "\n| call | past | "
        + " | ".join(f"{kept} us" for kept in formats)
        + " | "
        + " | ".join(f"fp32 / {kept}" for kept in formats[1:])
        + " |"
    )
    print("|---|---|" + "---|" * (2 * len(formats) - 1))
    for T in (1, 4, 256):
        for past in pasts:
            calls = {kept: Case(HEADS, 1, T, past, threads, kept).calls["ours"] for kept in formats}
            made = microseconds(calls, 7)
            ratios = [made["fp32"] / made[kept] for kept in formats[1:]]
            cells = [f"{made[kept]:.0f}" for kept in formats] + [f"{ratio:.2f}" for ratio in ratios]
            print(f"| {T} tokens | {past} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "demo-dense")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--speed", help="pasts, in tokens; only the speed is measured")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.speed:
        speed([int(past) for past in options.speed.split(",")], options.threads)
        return
    with tempfile.TemporaryDirectory() as name:
        quality(options.checkpoint, Path(name), options.windows, options.length)


if __name__ == "__main__":
    main()
