"""What drafting brings: tokens per second with and without, on one bundle in one process.

    python benchmarks/speculation_speed.py BUNDLE --text FILE            the model's own drafts on the text's continuation
    python benchmarks/speculation_speed.py BUNDLE --oracle 0.9,0.75,0.6    drafts that are kept with these chances

The oracle is for checkpoints with random weights, whose own drafts are worthless: head and verify run as they would, then a coin with the
given chance decides whether a draft stays. Costs are real, the acceptance is set. Runs with and without drafts alternate; medians. Prints
a markdown table with fixed lengths beside the automatic one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request, Statistics, generate
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.sampling.distribution import Distribution
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.speculation.acceptance import Acceptance, Draft, acceptance_for
from qwen_export.runtimes.speculation.draft_policy import AdaptiveLength, FixedLength, Policy
from qwen_export.runtimes.speculation.drafters import HeadDrafter
from qwen_export.runtimes.speculation.rounds import Speculator

GREEDY = SamplingParams(greedy=True)


class Coin:
    """Keeps a draft with chance `rate`, whatever the model says of it."""

    def __init__(self, rate: float, seed: int = 0) -> None:
        self._rate, self._rng = rate, np.random.default_rng(seed)

    def draft(self, q: Distribution, ahead: int) -> int:
        return int(q.ids[0])

    def token(self, p: Distribution, draft: Draft | None, ahead: int) -> int:
        if draft is not None and self._rng.random() < self._rate:
            return draft.token
        best = int(p.ids[0])
        return best if draft is None or best != draft.token else best ^ 1

    def advance(self, count: int) -> None:
        pass


def plain(decoder: Decoder, prompt: list[int], count: int) -> Statistics:
    decoder.reset()
    statistics = Statistics()
    list(generate(PrefixReuse(decoder), Request(prompt, Sampler(GREEDY), (), count), statistics))
    return statistics


def drafted(decoder: Decoder, prompt: list[int], count: int, policy: Policy, acceptance: Callable[[Sampler], Acceptance]) -> Statistics:
    if decoder.head is None:
        raise SystemExit("the bundle has no draft head")
    decoder.reset()
    statistics = Statistics()
    list(
        Speculator(HeadDrafter(decoder.head), policy, acceptance).generate(
            PrefixReuse(decoder), Request(prompt, Sampler(GREEDY), (), count), statistics
        )
    )
    return statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--oracle", help="chances that a draft is right, e.g. 0.9,0.75,0.6")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", default="1,2,3,4,6,8")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    model = load(arguments.bundle, threads=arguments.threads, max_context=2048)
    longest = model.manifest.speculation.max_draft if model.manifest.speculation else 0
    vocabulary = model.manifest.model["vocab_size"]
    if arguments.text:
        prompt = model.tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[:256]
    else:
        prompt = np.random.default_rng(1).integers(0, vocabulary, 64).tolist()
    reference, decoder = model.decoder(), model.decoder(drafts=True)
    lengths = [k for k in map(int, arguments.lengths.split(",")) if k <= longest]
    print("| drafts kept | length | tok/s | plain tok/s | ratio | tokens per round | draft ms | verify ms | host ms per round |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rate in [float(r) for r in arguments.oracle.split(",")] if arguments.oracle else [None]:
        for length in [*lengths, None]:
            runs: list[tuple[float, float, Statistics]] = []
            policy: Policy = AdaptiveLength(longest) if length is None else FixedLength(length)
            for i in range(arguments.rounds + 1):
                coin = Coin(rate, i) if rate is not None else None
                judge = acceptance_for if coin is None else lambda sampler, coin=coin: coin
                statistics = drafted(decoder, prompt, arguments.new_tokens, policy, judge)
                base = plain(reference, prompt, arguments.new_tokens)
                if i:  # the first run binds and warms
                    runs.append((statistics.decode_tok_per_s / base.decode_tok_per_s, base.decode_tok_per_s, statistics))
            runs.sort(key=lambda run: run[0])
            ratio, base_speed, statistics = runs[len(runs) // 2]
            s = statistics.speculation
            label = "own" if rate is None else f"{rate:.0%}"
            made = max(1, sum(s.drafted))
            print(
                f"| {label} | {length or 'auto'} | {statistics.decode_tok_per_s:.1f} | {base_speed:.1f} | {ratio:.2f} | "
                f"{s.tokens_per_round:.2f} | {1e3 * s.draft_s / made:.2f} | {1e3 * s.verify_s / s.rounds:.2f} | "
                f"{1e3 * s.host_s / s.rounds:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
