"""The automatic draft length next to every fixed one, on a model's own text.

    python -m benchmarks.draft_length BUNDLE --texts runtimes/*.py [--lengths 0,1,2,3,4,5,6,8] [--repeat 3]

Each text is continued greedily with every length, by turns, each time beginning with another length, so that a slower quarter of an hour
slows all of them; its time with a length is the median of the repetitions. The automatic one keeps what it measured from text to text, as
it does in a server. Prints tokens per second over all texts and the ratio to the best fixed length.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np

from benchmarks.speculation_speed import drafted
from qwen_export.runtimes import load
from qwen_export.runtimes.speculation.acceptance import acceptance_for
from qwen_export.runtimes.speculation.draft_policy import AdaptiveLength, FixedLength, Policy
from qwen_export.runtimes.speculation.round_times import make_ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--texts", type=Path, nargs="+", help="default: eight prompts of random tokens")
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--lengths", default="0,1,2,3,4,5,6,8")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    model = load(arguments.bundle, threads=arguments.threads, max_context=1024)
    assert model.manifest.speculation is not None, "the bundle has no draft head"
    if arguments.texts:
        prompts = [model.tokenizer.encode(path.read_text(encoding="utf-8"))[: arguments.prompt_tokens] for path in arguments.texts]
    else:
        prompts = np.random.default_rng(0).integers(0, model.manifest.model["vocab_size"], (8, arguments.prompt_tokens)).tolist()
    decoder = model.decoder(drafts=True)
    longest = model.manifest.speculation.max_draft
    policies: dict[str, Policy] = {k: FixedLength(int(k)) for k in arguments.lengths.split(",") if int(k) <= longest}
    policies["auto"] = adaptive = AdaptiveLength(longest)
    make_ready(decoder, longest, adaptive.time_of)
    for policy in policies.values():
        drafted(decoder, prompts[0], arguments.new_tokens, policy, acceptance_for)  # binds and warms
    seconds = {name: [[0.0] * arguments.repeat for _ in prompts] for name in policies}
    rounds, tokens = dict.fromkeys(policies, 0), dict.fromkeys(policies, 0)
    names = list(policies)
    for repetition in range(arguments.repeat):
        for i, prompt in enumerate(prompts):
            first = (repetition * len(prompts) + i) % len(names)
            for name in names[first:] + names[:first]:
                run = drafted(decoder, prompt, arguments.new_tokens, policies[name], acceptance_for)
                seconds[name][i][repetition] = run.total_s - run.first_token_s
                rounds[name] += run.speculation.rounds
                tokens[name] += run.speculation.tokens
    total = {name: sum(statistics.median(times) for times in per_text) for name, per_text in seconds.items()}
    made = len(prompts) * (arguments.new_tokens - 1)
    best = min(value for name, value in total.items() if name != "auto")
    print("| length | tok/s | of the best fixed one | tokens per round |")
    print("|---|---|---|---|")
    for name, value in total.items():
        print(f"| {name} | {made / value:.1f} | {best / value:.3f} | {tokens[name] / max(1, rounds[name]):.2f} |")


if __name__ == "__main__":
    main()
