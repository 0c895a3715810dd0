"""What drafting brings: tokens per second with and without, on one bundle in one process.

    python benchmarks/speculation_speed.py BUNDLE --text FILE            the model's own drafts on the text's continuation
    python benchmarks/speculation_speed.py BUNDLE --oracle 0.9,0.75,0.6    drafts that are kept with these chances

The oracle is for checkpoints with random weights, whose own drafts are worthless: head and verify run as they would, then a coin with the
given chance decides whether a draft stays. Costs are real, the acceptance is set. A place of the text has one coin, whatever the length of
the drafts: else one length would be luckier than another by more than their times differ. Runs with and without drafts alternate; the
tokens of all rounds over their time. The automatic length begins as in a model that was just loaded. Prints a markdown table with fixed
lengths beside the automatic one.
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
from qwen_export.runtimes.speculation.round_times import make_ready
from qwen_export.runtimes.speculation.rounds import Speculator

GREEDY = SamplingParams(greedy=True)


class Coin:
    """Keeps a draft of the token at a place of the text with chance `rate`, whatever the model says of it."""

    def __init__(self, rate: float, tokens: int, seed: int = 0) -> None:
        self._kept: list[bool] = (np.random.default_rng(seed).random(tokens) < rate).tolist()
        self._place = 0

    def draft(self, q: Distribution, ahead: int) -> int:
        return int(q.ids[0])

    def token(self, p: Distribution, draft: Draft | None, ahead: int) -> int:
        kept, self._place = self._kept[self._place % len(self._kept)], self._place + 1
        if draft is not None and kept:
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
    make_ready(decoder, longest, None)
    for k in range(longest + 1):  # binds and warms where nothing is recorded
        drafted(decoder, prompt, longest + 2, FixedLength(k), acceptance_for)
    plain(reference, prompt, arguments.new_tokens)
    print("| drafts kept | length | tok/s | plain tok/s | ratio | tokens per round | draft ms | verify ms | host ms per round |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rate in [float(r) for r in arguments.oracle.split(",")] if arguments.oracle else [None]:
        adaptive = AdaptiveLength(longest)
        decoder.reset()
        make_ready(decoder, longest, adaptive.time_of)
        policies: dict[str, Policy] = {**{str(k): FixedLength(k) for k in lengths}, "auto": adaptive}
        runs: dict[str, list[tuple[Statistics, Statistics]]] = {name: [] for name in policies}
        for i in range(arguments.rounds):
            for name, policy in policies.items():
                judge = acceptance_for if rate is None else lambda sampler, i=i, rate=rate: Coin(rate, arguments.new_tokens, i)
                with_drafts = drafted(decoder, prompt, arguments.new_tokens, policy, judge)
                runs[name].append((with_drafts, plain(reference, prompt, arguments.new_tokens)))
        for name, pairs in runs.items():
            print(f"| {'own' if rate is None else f'{rate:.0%}'} | {name} | {row(pairs)} |", flush=True)


def row(pairs: list[tuple[Statistics, Statistics]]) -> str:
    """Of the table: runs with drafts and without."""
    speed, base = (
        sum(run.new_tokens - 1 for run in runs) / sum(run.total_s - run.first_token_s for run in runs) for runs in zip(*pairs, strict=True)
    )
    each = [run.speculation for run, _ in pairs]
    rounds, made = sum(s.rounds for s in each), max(1, sum(sum(s.drafted) for s in each))
    times = (sum(s.draft_s for s in each) / made, sum(s.verify_s for s in each) / rounds)
    host = sum(s.host_s for s in each) / rounds
    return " | ".join(
        [f"{speed:.1f}", f"{base:.1f}", f"{speed / base:.2f}", f"{sum(s.tokens for s in each) / rounds:.2f}"]
        + [f"{1e3 * seconds:.2f}" for seconds in times]
        + [f"{1e3 * host:.3f}"]
    )


if __name__ == "__main__":
    main()
