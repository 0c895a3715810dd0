"""The automatic draft length beside the best fixed one on simulated machines, whose rounds take what was measured on real ones.

    python benchmarks/draft_simulation.py [--texts 80] [--tokens 192] [--measured 5] [--machines "4B int4, H200;..."]

A text is the first of a model that was loaded: each length has been timed `--measured` times before. Each place of a text has one coin,
whatever the length of the drafts, so that all lengths have the same luck. Rounds take longer or shorter by chance, and the first of another
length 3 % longer. Prints the best fixed length and its time over that of the automatic one, for chances that a draft is kept: the same at
each place of the draft; `falling` from draft to draft; `turns` of 300 tokens with 90 % and 300 with 50 %; `sharp turns` of 400 tokens with
95 % and 400 with 10 %.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwen_export.runtimes.speculation.draft_policy import AdaptiveLength, FixedLength, Policy

LONGEST, COLD = 8, 1.03
_FALLING = (0.85, 0.75, 0.65, 0.55, 0.45)


class Machine(NamedTuple):
    """Milliseconds of a plain step and of a step of the draft head, the time of a verify by its tokens in plain steps (linear in between),
    and the relative standard deviation of a round."""

    plain: float
    draft: float
    verify: dict[int, float]
    noise: float

    def rounds(self) -> list[float]:
        """Milliseconds with 0, 1, ... drafts."""
        widths = list(self.verify)
        times = [float(np.interp(1 + k, widths, [self.verify[width] for width in widths])) for k in range(LONGEST + 1)]
        return [self.plain * time + self.draft * k for k, time in enumerate(times)]


MACHINES = {
    "4B int4, H200": Machine(1.75, 0.2, {1: 1, 2: 1.05, 3: 1.12, 4: 1.35, 5: 1.4, 9: 1.6}, 0.015),
    "4B int4, H200, no chains": Machine(2.3, 0.2, {1: 1, 2: 1.06, 3: 1.1, 4: 1.14, 5: 1.2, 9: 1.5}, 0.015),
    "4B bf16, H200": Machine(3.05, 0.25, {1: 1, 2: 1.02, 3: 1.12, 4: 1.14, 5: 1.2, 9: 1.3}, 0.015),
    "0.8B int4, H200": Machine(0.75, 0.15, {1: 1, 2: 1.1, 3: 1.15, 4: 1.2, 5: 1.3, 9: 1.6}, 0.03),
    "demo-dense, H200": Machine(0.24, 0.06, {1: 1, 2: 1.2, 3: 1.25, 4: 1.3, 5: 1.35, 9: 1.5}, 0.05),
    "0.8B fp32, CPU": Machine(45, 10, {1: 1, 2: 1.25, 3: 1.5, 4: 1.75, 9: 3.0}, 0.06),
    "a cheap verify, CPU": Machine(10, 1, {1: 1, 2: 1.1, 9: 1.8}, 0.08),
}
TEXTS = ("0", "0.2", "0.4", "0.6", "0.75", "0.9", "0.95", "falling", "turns", "sharp turns")


def chance(text: str, place: int, depth: int) -> float:
    """That a draft of the token at `place` is kept, with `depth` drafts before it."""
    if text == "falling":
        return _FALLING[min(depth, len(_FALLING) - 1)]
    if text == "turns":
        return 0.9 if place // 300 % 2 == 0 else 0.5
    if text == "sharp turns":
        return 0.95 if place // 400 % 2 == 0 else 0.1
    return float(text)


def milliseconds(policy: Policy, machine: Machine, text: str, coins: Sequence[float], chances: np.random.Generator | None) -> float:
    """Of a text; `chances` draw what rounds take beside what they take in the mean."""
    times, total, made, last = machine.rounds(), 0.0, 0, -1
    while made < len(coins):
        count, kept = policy.length(len(coins) - made - 1), 0
        while kept < count and coins[made + kept] < chance(text, made + kept, kept):
            kept += 1
        time = times[count]
        if chances is not None:
            time *= math.exp(chances.normal(0, machine.noise)) * (COLD if count != last else 1)
        policy.observe(count, kept, time / 1000)
        total, made, last = total + time, made + kept + 1, count
    return total


def of_the_best(machine: Machine, text: str, tokens: int, texts: int, measured: int) -> tuple[int, float]:
    """The best fixed length, and its time over that of the automatic one."""
    fixed, automatic = np.zeros(LONGEST + 1), 0.0
    for seed in range(texts):
        coins = np.random.default_rng(seed).random(tokens).tolist()
        chances, policy = np.random.default_rng(1000 + seed), AdaptiveLength(LONGEST)
        for count, time in enumerate(machine.rounds()):
            for _ in range(measured):
                policy.time_of(count, time / 1000 * math.exp(chances.normal(0, machine.noise)))
        automatic += milliseconds(policy, machine, text, coins, chances)
        fixed += [milliseconds(FixedLength(k), machine, text, coins, None) for k in range(LONGEST + 1)]
    return int(fixed.argmin()), float(fixed.min() * math.exp(machine.noise**2 / 2) / automatic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--measured", type=int, default=5, help="rounds of each length that were timed before the text")
    parser.add_argument("--machines", help="some of those of the table, with ; between them")
    given = parser.parse_args()
    print(f"| machine | {' | '.join(TEXTS)} |\n|---|{'---|' * len(TEXTS)}")
    for name in given.machines.split(";") if given.machines else MACHINES:
        found = [of_the_best(MACHINES[name], text, given.tokens, given.texts, given.measured) for text in TEXTS]
        print(f"| {name} | {' | '.join(f'{best}: {share:.3f}' for best, share in found)} |", flush=True)


if __name__ == "__main__":
    main()
