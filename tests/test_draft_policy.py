"""How long drafts get: against a simulated machine whose costs and acceptance are known."""

from __future__ import annotations

import itertools

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
    five percent, over a few streams."""
    tokens = 4000
    for acceptance, wider, draft in ((0.9, 0.5, 0.3), (0.75, 0.1, 0.1), (0.2, 0.3, 0.3)):
        times = dict.fromkeys([*map(str, range(5)), "auto"], 0.0)
        for name, seed in itertools.product(times, range(5, 9)):
            policy = AdaptiveLength(LONGEST) if name == "auto" else FixedLength(int(name))
            machine, wander = Machine(acceptance, wider, draft, seed), np.random.default_rng(seed)
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
            times[name] += total
        assert times.pop("auto") <= 1.05 * min(times.values())


@pytest.mark.parametrize("draft", [0.05, 0.2, 0.4])
def test_what_is_kept_elsewhere_is_known_from_the_start(draft: float) -> None:
    """Steps of other numbers of rows have times of their own, and the same texts: hopeless drafts cost each number little."""
    tokens, total = 128, 0.0
    for seed in range(10):
        kept = KeptShares(LONGEST)
        Machine(0.0, 0.15, draft, seed).seconds(AdaptiveLength(LONGEST, kept), 500)
        total += Machine(0.0, 0.15, draft, seed).seconds(AdaptiveLength(LONGEST, kept), tokens)
    assert total <= 1.03 * 0.01 * tokens * 10


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


# A round of 0, 1, ... drafts of a 4B in int4 on an H200, in plain steps: products of up to three rows are chains, of more they are not.
BENT = [1.0, 1.16, 1.35, 1.69, 1.86, 2.0, 2.15, 2.3, 2.51]


class Text:
    """A text in which the chance that a draft is kept depends on the place: each place has one coin, whatever the length of the drafts."""

    def __init__(self, chances: list[float], seed: int) -> None:
        self.kept = (np.random.default_rng(seed).random(len(chances)) < chances).tolist()

    def steps(self, policy: Policy, costs: list[float], noise: np.random.Generator) -> float:
        """Plain steps' time that the text takes."""
        total, made = 0.0, 0
        while made < len(self.kept):
            count = policy.length(len(self.kept) - made - 1)
            kept = 0
            while kept < count and self.kept[made + kept]:
                kept += 1
            cost = costs[count] * noise.lognormal(0, 0.02)
            policy.observe(count, kept, 0.002 * cost)
            total, made = total + cost, made + kept + 1
        return total


def of_the_best(chances: list[float], costs: list[float], texts: int) -> float:
    """Time of the automatic length over that of the best fixed one, for answers each of which is the first of a model that was loaded."""
    automatic, fixed = 0.0, np.zeros(len(costs))
    for seed in range(texts):
        text, noise, policy = Text(chances, seed), np.random.default_rng(100 + seed), AdaptiveLength(LONGEST)
        for count, cost in enumerate(costs):
            for _ in range(5):
                policy.time_of(count, 0.002 * cost * noise.lognormal(0, 0.02))
        automatic += text.steps(policy, costs, noise)
        fixed += [text.steps(FixedLength(k), costs, noise) for k in range(len(costs))]
    return automatic / fixed.min()


@pytest.mark.parametrize("costs", [BENT, [1 + 0.26 * k for k in range(LONGEST + 1)], [1 + 0.6 * k for k in range(LONGEST + 1)]])
@pytest.mark.parametrize("acceptance", [0.0, 0.4, 0.75, 0.95])
def test_times_that_were_measured_before_make_the_first_answer_a_good_one(acceptance: float, costs: list[float]) -> None:
    assert of_the_best([acceptance] * 192, costs, texts=30) <= 1.035


@pytest.mark.parametrize(("easy", "hard"), [(0.9, 0.5), (0.95, 0.1)])
def test_the_length_follows_a_text_that_changes(easy: float, hard: float) -> None:
    assert of_the_best(([easy] * 400 + [hard] * 400) * 4, BENT, texts=6) <= 1.035
