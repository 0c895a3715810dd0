"""The planner of steps, without a model: whatever arrives, grows, is cancelled or lost, its promises hold."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_export.errors import ParameterError
from qwen_export.runtimes.serving.chunk_budget import STALL, ChunkBudget
from qwen_export.runtimes.serving.scheduler import Scheduler

FIXED, CHUNK, AHEAD = 3, 16, 2


def cost(tokens: int) -> int:
    return FIXED + tokens


@dataclass
class Arrival:
    at: int
    prompt: int
    answer: int
    cancel_at: int


ARRIVALS = st.lists(
    st.builds(Arrival, st.integers(0, 40), st.integers(1, 60), st.integers(1, 40), st.integers(1, 400)), min_size=1, max_size=20
)


class Machine:
    """Does what a plan says, and checks it."""

    def __init__(self, slots: int, limit: int) -> None:
        self.slots, self.limit = slots, limit
        self.scheduler = Scheduler(slots, limit, cost, CHUNK, AHEAD)
        self.known: dict[int, int] = {}
        self.read: dict[int, int] = {}
        self.saved: dict[int, int] = {}
        self.entered_first: list[int] = []

    def change(self) -> None:
        changes = self.scheduler.admit()
        for key in changes.leave:
            assert key != min(self.known), "the oldest job keeps its slot"
            self.saved[key] = self.read.pop(key)
        for key, slot in changes.enter:
            assert 0 <= slot < self.slots
            if key not in self.entered_first:
                self.entered_first.append(key)
            self.read[key] = self.saved.get(key, 0)
            self.scheduler.entered(key, self.read[key])
        running = self.scheduler.running
        assert len({job.slot for job in running.values()}) == len(running) <= self.slots
        assert self.scheduler.held <= self.limit or len(running) == 1
        if self.known:
            assert min(self.known) in running, "the oldest job runs"

    def step(self, budget: int, least: int) -> None:
        step = self.scheduler.plan(budget, least)
        keys = [*step.rows, *(part.key for part in step.parts)]
        assert len(set(keys)) == len(keys)
        assert {key for key, job in self.scheduler.running.items() if job.left == 1} == set(step.rows), "no row waits"
        assert sum(part.tokens for part in step.parts) <= max(1, budget)
        assert all(1 <= part.tokens <= CHUNK for part in step.parts)
        assert keys or not self.scheduler.running
        for part in step.parts:
            self.read[part.key] += part.tokens
            assert self.read[part.key] <= self.known[part.key]
        for key in step.rows:
            self.read[key] += 1
        for key in keys:
            if self.read[key] == self.known[key]:
                self.known[key] += 1
            self.scheduler.has(key, self.read[key], self.known[key])

    def end(self, key: int) -> None:
        self.scheduler.remove(key)
        for table in (self.known, self.read, self.saved):
            table.pop(key, None)


@settings(max_examples=200, deadline=None)
@given(ARRIVALS, st.integers(1, 6), st.integers(110, 300), st.integers(1, 40), st.integers(1, 8))
def test_every_job_ends_in_order_and_within_memory(arrivals: list[Arrival], slots: int, limit: int, budget: int, least: int) -> None:
    machine = Machine(slots, limit)
    arrivals = sorted(arrivals, key=lambda arrival: arrival.at)
    todo = dict(enumerate(arrivals))
    ends = {key: arrival.prompt + arrival.answer for key, arrival in todo.items()}
    for now in range(40 + sum(arrival.prompt + arrival.answer for arrival in arrivals) * 4):
        for key in [key for key, arrival in todo.items() if arrival.at <= now]:
            arrival = todo.pop(key)
            machine.known[key] = arrival.prompt
            machine.scheduler.add(key, arrival.prompt, min(8, arrival.answer))
        for key in [key for key in machine.known if arrivals[key].cancel_at == now or machine.known[key] >= ends[key]]:
            machine.end(key)
        machine.change()
        machine.step(budget, least)
        if not todo and not machine.known:
            break
    assert not machine.known, "every job has ended"
    assert machine.entered_first == sorted(machine.entered_first), "first come, first served"


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = Scheduler(2, 10_000, cost, CHUNK)
    for key, length in enumerate((3200, 20)):
        scheduler.add(key, length)
    for key, _slot in scheduler.admit().enter:
        scheduler.entered(key, 0)
    read = [0, 0]
    for _ in range(5):
        for part in scheduler.plan(CHUNK).parts:
            read[part.key] += part.tokens
            scheduler.has(part.key, read[part.key], (3200, 20)[part.key])
    assert read[1] >= 19
    assert read[0] >= 2 * CHUNK, "and the long one goes on"


def test_reads_end_at_cuts() -> None:
    scheduler = Scheduler(1, 10_000, cost, CHUNK)
    scheduler.add(0, 40)
    scheduler.admit()
    scheduler.entered(0, 5, [30, 12, 5, 40])
    ends, read = [], 5
    while read < 40:
        [part] = scheduler.plan(CHUNK).parts or [None]
        if part is None:
            break
        read += part.tokens
        scheduler.has(0, read, 40)
        ends.append(read)
        if read == 39:
            break
    assert ends[:3] == [12, 28, 30]


def test_what_never_fits_is_refused() -> None:
    scheduler = Scheduler(4, 100, cost, CHUNK, AHEAD)
    scheduler.add(0, 100 - FIXED - AHEAD)
    with pytest.raises(ParameterError, match="cache_memory"):
        scheduler.add(1, 101 - FIXED - AHEAD)


@pytest.mark.parametrize("fixed_s", [0.002, 0.015])
@pytest.mark.parametrize("slower", [1.0, 1.2])
def test_parts_are_as_large_as_the_others_can_bear(fixed_s: float, slower: float) -> None:
    """A step of the rows takes 20 ms, some more beside a prompt; a part takes `fixed_s` and 0.2 ms a token."""
    budget = ChunkBudget(512)
    budget.observe(4, 0.02, [])
    sizes = []
    for _ in range(12):
        size, _least = budget.tokens(4)
        sizes.append(size)
        budget.observe(4, 0.02 * slower, [(size, fixed_s + 0.0002 * size)])
    longest = 0.02 * slower + fixed_s + 0.0002 * sizes[-1]
    assert longest <= STALL * 0.02
    assert longest + 0.0002 * sizes[-1] > 0.8 * STALL * 0.02, "not smaller than needed"
    assert budget.tokens(0)[0] == 512


def test_parts_are_whole_where_no_answer_waits_for_its_next_token() -> None:
    budget = ChunkBudget(512, float("inf"))
    for _ in range(3):
        assert budget.tokens(4)[0] == 512
        budget.observe(4, 0.02, [(512, 1.0)])


def test_short_prompts_that_come_together_are_read_at_once() -> None:
    """With what earlier steps had left: all but the last of 32 prompts would otherwise wait for dozens of steps. A long prompt gets what
    the rule gives it, and a stream of short ones no more than the credit."""
    budget, step_s, token_s = ChunkBudget(2048), 0.002, 0.00001
    budget.observe(0, 0.0, [(2048, 2048 * token_s)])
    for _ in range(40):
        budget.observe(16, step_s, [])
    for _ in range(20):
        size, _ = budget.tokens(16, 32_000)
        assert size * token_s <= STALL * step_s
        budget.observe(16, step_s, [(size, size * token_s)])
    assert budget.tokens(16, 128)[0] == 2048
    read = spent = 0.0
    for _ in range(200):
        size, _ = budget.tokens(16, 128)
        budget.observe(16, step_s, [(size, size * token_s)])
        spent += step_s + size * token_s
        read += size
    assert spent <= 200 * STALL * step_s + 0.11
