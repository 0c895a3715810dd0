"""How long drafts get: against a simulated machine whose costs and acceptance are known."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_export.runtimes.speculation.draft_policy import AdaptiveLength, FixedLength, KeptShares, Policy

LONGEST = 8


class Machine:
    """A stream with a fixed chance that a draft is kept; a plain step takes 10 ms."""

    def __init__(self, acceptance: float, wider: float, draft: float, seed: int = 0) -> None:
        self.acceptance, self.wider, self.draft = acceptance, wider, draft
        self.rng = np.random.default_rng(seed)

    def seconds(self, policy: Policy, tokens: int) -> float:
        total, made = 0.0, 0
        while made < tokens:
            count = policy.length(tokens - made - 1)
            kept = 0
            while kept < count and self.rng.random() < self.acceptance:
                kept += 1
            noise = self.rng.uniform(0.95, 1.05)
            draft_s, verify_s = 0.01 * self.draft * count * noise, 0.01 * (1 + self.wider * count) * noise
            policy.observe(count, kept, draft_s + verify_s)
            total += draft_s + verify_s
            made += kept + 1
        return total


@pytest.mark.parametrize("wider", [0.03, 0.15, 0.5])
@pytest.mark.parametrize("draft", [0.05, 0.35])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.75, 0.9])
def test_the_choice_is_within_five_percent_of_the_best_fixed_length(acceptance: float, wider: float, draft: float) -> None:
    tokens = 4000
    fixed = min(Machine(acceptance, wider, draft).seconds(FixedLength(k), tokens) for k in range(LONGEST + 1))
    assert Machine(acceptance, wider, draft, seed=1).seconds(AdaptiveLength(LONGEST), tokens) <= 1.05 * fixed


@pytest.mark.parametrize("draft", [0.05, 0.4])
def test_hopeless_drafts_cost_a_short_stream_less_than_five_percent(draft: float) -> None:
    tokens = 128
    slow = [Machine(0.0, 0.1, draft, seed).seconds(AdaptiveLength(LONGEST), tokens) for seed in range(20)]
    assert np.mean(slow) <= 1.05 * 0.01 * tokens


def test_a_slow_first_call_does_not_rule_drafting_out() -> None:
    """Pages that are touched first, or a graph that is recorded, make the first call of a width long."""
    policy = AdaptiveLength(LONGEST)
    for i in range(200):
        count = policy.length(LONGEST)
        policy.observe(count, count, 0.001 * count + (0.5 if i < 6 else 0.01))
    assert policy.length(LONGEST) >= 4


def test_drafting_comes_back_when_the_text_becomes_easy() -> None:
    policy = AdaptiveLength(LONGEST)
    for _ in range(300):
        count = policy.length(LONGEST)
        policy.observe(count, 0, 0.002 * count + 0.01 + 0.001 * count)
    assert policy.length(LONGEST) == 0
    lengths = []
    for _ in range(3000):
        count = policy.length(LONGEST)
        lengths.append(count)
        policy.observe(count, count, 0.0005 * count + 0.01 + 0.0005 * count)
    assert np.mean(lengths[-100:]) >= 4


def test_a_limit_is_kept() -> None:
    policy = AdaptiveLength(LONGEST)
    for _ in range(50):
        policy.observe(policy.length(LONGEST), 0, 0.01)
    assert policy.length(0) == 0 and policy.length(-1) == 0
    assert FixedLength(4).length(2) == 2


def test_a_cold_start_and_a_noisy_machine_do_not_mislead_for_long() -> None:
    """The first steps of a process are slow, the first rounds of a length too, and the machine's speed wanders by a third: still within
    five percent."""
    tokens, worst = 6000, []
    for acceptance, wider, draft in ((0.9, 0.5, 0.3), (0.75, 0.1, 0.1), (0.2, 0.3, 0.3)):
        times = {}
        for name, policy in {**{str(k): FixedLength(k) for k in range(LONGEST + 1)}, "auto": AdaptiveLength(LONGEST)}.items():
            machine = Machine(acceptance, wider, draft, seed=5)
            wander = np.random.default_rng(7)
            total, slow, made, rounds, seen = 0.0, 1.0, 0, 0, dict.fromkeys(range(LONGEST + 1), 0)
            while made < tokens:
                count = policy.length(tokens - made - 1)
                kept = 0
                while kept < count and machine.rng.random() < acceptance:
                    kept += 1
                slow = min(1.33, max(1.0, slow * wander.uniform(0.95, 1.0526)))
                noise = slow * wander.lognormal(0, 0.1) * (2.5 if rounds < 4 or not seen[count] else 1.0)
                seen[count] += 1
                draft_s, verify_s = 0.01 * draft * count * noise, 0.01 * (1 + wider * count) * noise
                policy.observe(count, kept, draft_s + verify_s)
                total, made, rounds = total + draft_s + verify_s, made + kept + 1, rounds + 1
            times[name] = total
        worst.append(times.pop("auto") / min(times.values()))
    assert max(worst) <= 1.05, worst


def test_what_is_kept_elsewhere_is_known_from_the_start() -> None:
    """Steps of other numbers of rows have times of their own, and the same texts: hopeless drafts are not tried again for each number."""
    kept = KeptShares(LONGEST)
    Machine(0.0, 0.15, 0.2).seconds(AdaptiveLength(LONGEST, kept), 500)
    policy, made = AdaptiveLength(LONGEST, kept), []
    for _ in range(40):
        made.append(policy.length(LONGEST))
        policy.observe(made[-1], 0, 0.01 + 0.002 * made[-1])
    assert sum(made) <= 3


def test_time_of_making_a_call_is_no_cost_of_its_length() -> None:
    """The caller leaves it out; a first round that is slow for another reason counts little."""
    policy = AdaptiveLength(LONGEST)
    total, slow = 0, set[int]()
    for _ in range(400):
        count = policy.length(LONGEST)
        policy.observe(count, count, (0.01 + 0.001 * count) * (1 if count in slow else 30))
        slow.add(count)
        total += count + 1
    assert total > 400 * 0.8 * (LONGEST + 1)


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.9])
@pytest.mark.parametrize(("wider", "draft"), [(0.06, 0.2), (0.3, 0.3)])
def test_times_that_were_measured_before_make_the_first_answer_a_good_one(acceptance: float, wider: float, draft: float) -> None:
    tokens, total, fixed = 192, 0.0, np.zeros(LONGEST + 1)
    for seed in range(30):
        policy, machine = AdaptiveLength(LONGEST), Machine(acceptance, wider, draft, seed)
        for count in range(LONGEST + 1):
            for _ in range(5):
                policy.time_of(count, 0.01 * (1 + (wider + draft) * count) * machine.rng.uniform(0.95, 1.05))
        fixed += [Machine(acceptance, wider, draft, 100 + seed).seconds(FixedLength(k), tokens) for k in range(LONGEST + 1)]
        total += machine.seconds(policy, tokens)
    assert total <= 1.05 * fixed.min()
