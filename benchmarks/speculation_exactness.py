"""Is the text the same with and without drafts? Greedy continuations of many prompts, for every draft length.

    python benchmarks/speculation_exactness.py BUNDLE --text FILE [FILE ...] [--prompts 200 --new-tokens 128 --lengths 1,2,3,4,5,6,7,8]

Prompts are pieces of the texts, of 24 to 120 tokens, read in chunks that differ from prompt to prompt. Where two texts part, the plain
model's logits tell whether it was a tie: the gap between its choice and the other token. Prints a markdown table; exits with 1 when a
difference is larger than --tie.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request, Statistics, generate
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.speculation.draft_policy import FixedLength
from qwen_export.runtimes.speculation.drafters import HeadDrafter
from qwen_export.runtimes.speculation.rounds import Speculator

CHUNKS = (512, 7, 16, 1, 33)


def cut_prompts(model: Model, texts: Sequence[Path], count: int) -> list[list[int]]:
    """`count` pieces, evenly spread over the texts."""
    ids = model.tokenizer.encode("\n".join(path.read_text(encoding="utf-8") for path in texts))
    lengths = np.random.default_rng(0).integers(24, 121, count)
    starts = np.linspace(0, len(ids) - 121, count).astype(int)
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def run(decoder: Decoder, prompt: list[int], new_tokens: int, length: int) -> tuple[list[int], Statistics]:
    """Greedy tokens with drafts of `length`, 0 for none."""
    decoder.reset()
    request, statistics = Request(prompt, Sampler(SamplingParams(greedy=True)), (), new_tokens), Statistics()
    reuse = PrefixReuse(decoder)
    if length == 0:
        return list(generate(reuse, request, statistics)), statistics
    if decoder.head is None:
        raise SystemExit("the bundle has no draft head")
    return list(Speculator(HeadDrafter(decoder.head), FixedLength(length)).generate(reuse, request, statistics)), statistics


def gap_at(decoder: Decoder, prompt: list[int], tokens: list[int], other: int) -> float:
    """How much less likely than the plain model's choice the token `other` is after prompt and `tokens`, in logits."""
    decoder.reset()
    logits = decoder.prefill(prompt)
    for token in tokens:
        logits = decoder.step([token])[0]
    return float(logits.max() - logits[other])


def compare(task: tuple[str, list[list[int]], int, list[int], int]) -> dict[int, list[tuple[float, int, int]]]:
    """Per length and prompt: the gap where the texts part (nan: they do not), tokens and rounds."""
    bundle, prompts, new_tokens, lengths, threads = task
    model = load(bundle, threads=threads, max_context=512)
    plain, drafted = model.decoder(), model.decoder(drafts=True)
    out: dict[int, list[tuple[float, int, int]]] = {length: [] for length in lengths}
    for i, prompt in enumerate(prompts):
        expected, _ = run(plain, prompt, new_tokens, 0)
        drafted.chunk = CHUNKS[i % len(CHUNKS)]
        for length in lengths:
            tokens, statistics = run(drafted, prompt, new_tokens, length)
            gap = float("nan")
            if tokens != expected:
                at = next(j for j, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b)
                gap = gap_at(plain, prompt, expected[:at], tokens[at])
            out[length].append((gap, statistics.speculation.tokens, statistics.speculation.rounds))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--lengths", default="1,2,3,4,5,6,7,8")
    parser.add_argument("--tie", type=float, default=1e-4, help="largest gap that counts as a tie, in logits")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    lengths = [int(k) for k in arguments.lengths.split(",")]
    prompts = cut_prompts(load(arguments.bundle, speculate="off"), arguments.text, arguments.prompts)
    parts = [prompts[i :: arguments.processes] for i in range(arguments.processes)]
    tasks = [(arguments.bundle, part, arguments.new_tokens, lengths, 1 if arguments.processes > 1 else 0) for part in parts]
    # A process that already uses CUDA cannot be forked.
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(compare, tasks))
    print("| draft length | prompts | tokens each | texts that part | at a tie | largest gap | tokens per round |")
    print("|---|---|---|---|---|---|---|")
    wrong = 0
    for length in lengths:
        rows = [row for result in results for row in result[length]]
        gaps = [gap for gap, _, _ in rows if not np.isnan(gap)]
        ties = sum(gap <= arguments.tie for gap in gaps)
        wrong += len(gaps) - ties
        per_round = sum(t for _, t, _ in rows) / sum(r for _, _, r in rows)
        largest = f"{max(gaps):.1e}" if gaps else "-"
        print(f"| {length} | {len(rows)} | {arguments.new_tokens} | {len(gaps)} | {ties} | {largest} | {per_round:.2f} |", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
