"""What drafting brings: tokens per second with and without, on one bundle in one process.

    python benchmarks/speculation_speed.py BUNDLE --text FILE            the model's own drafts on the text's continuation
    python benchmarks/speculation_speed.py BUNDLE --oracle 0.9,0.75,0.6    drafts that are right with these chances

The oracle is for checkpoints with random weights, whose own drafts are worthless: the draft head runs as it would, then each draft is
replaced by the token that the model will choose, with the given chance, or by another. Costs are real, the acceptance is set. Rounds with
and without drafts alternate; medians. Prints a markdown table with the best fixed length beside the automatic one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.acceptance import Acceptance, Draft
from qwen_export.runtimes.decoder import Decoder
from qwen_export.runtimes.draft_head import DraftHead
from qwen_export.runtimes.draft_policy import AdaptiveLength, FixedLength, Policy
from qwen_export.runtimes.drafting import Drafter, HeadDrafter
from qwen_export.runtimes.generation import Request, Statistics, generate
from qwen_export.runtimes.prefix_reuse import PrefixReuse
from qwen_export.runtimes.sampling import Distribution, Sampler
from qwen_export.runtimes.speculation import Speculator
from qwen_export.runtimes.token_history import TokenHistory

GREEDY = SamplingParams(greedy=True)


class Oracle:
    """Runs the head for its cost and drafts the truth with chance `rate`. `truth` is prompt and plain continuation."""

    def __init__(self, head: DraftHead, decoder: Decoder, truth: Sequence[int], rate: float) -> None:
        self._head, self._decoder, self._truth, self._rate = head, decoder, truth, rate
        self._rng = np.random.default_rng(0)

    def draft(self, token: int, count: int, sampler: Sampler, acceptance: Acceptance, history: TokenHistory) -> list[Draft]:
        at, drafts = self._decoder.lengths[0] + 1, []
        for i in range(count):
            logits = self._head.following(drafts[-1].token, i) if drafts else self._head.first(token)
            logits.argmax()
            right = self._truth[at + i] if at + i < len(self._truth) else 0
            guess = right if self._rng.random() < self._rate else (right + 1) % len(logits)
            drafts.append(Draft(guess, Distribution(np.array([guess]), np.ones(1))))
        return drafts


def plain(decoder: Decoder, prompt: list[int], count: int) -> tuple[list[int], Statistics]:
    decoder.reset()
    statistics = Statistics()
    return list(generate(PrefixReuse(decoder), Request(prompt, Sampler(GREEDY), (), count), statistics)), statistics


def drafted(decoder: Decoder, prompt: list[int], count: int, drafter: Drafter, policy: Policy) -> Statistics:
    decoder.reset()
    statistics = Statistics()
    list(Speculator(drafter, policy).generate(PrefixReuse(decoder), Request(prompt, Sampler(GREEDY), (), count), statistics))
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
    if decoder.head is None:
        raise SystemExit("the bundle has no draft head")
    truth = [*prompt, *plain(reference, prompt, arguments.new_tokens)[0]]
    lengths = [k for k in map(int, arguments.lengths.split(",")) if k <= longest]
    print("| drafts right | length | tok/s | plain tok/s | ratio | tokens per round | draft ms | verify ms | host ms per round |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rate in [float(r) for r in arguments.oracle.split(",")] if arguments.oracle else [None]:
        for length in [*lengths, None]:
            runs: list[tuple[float, float, Statistics]] = []
            policy: Policy = AdaptiveLength(longest) if length is None else FixedLength(length)
            for i in range(arguments.rounds + 1):
                drafter: Drafter = HeadDrafter(decoder.head) if rate is None else Oracle(decoder.head, decoder, truth, rate)
                statistics = drafted(decoder, prompt, arguments.new_tokens, drafter, policy)
                base = plain(reference, prompt, arguments.new_tokens)[1]
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
