"""An engine of requests over engines of TensorRT, which take one sequence: turns per round, and for each request what it gets alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.serving.engine import Engine
from tests.support.engine_machine import CAPACITY, PROMPT, Machine

SAMPLINGS = (SamplingParams(greedy=True), SamplingParams(seed=3, top_k=20), SamplingParams(seed=4, top_k=0, temperature=0.8))


def requests() -> list[Request]:
    """Prompts that begin alike, with a point to come back to; one is cut short by its limit."""
    made = []
    for number, sampling in enumerate(SAMPLINGS):
        ids = [*PROMPT, *PROMPT[: 3 + 4 * number]]
        made.append(Request(ids, Sampler(sampling, 90), (), 20 + number, len(PROMPT)))
    return made


def texts(model: Model) -> list[list[int]]:
    return [list(model.generate(request, Statistics())) for request in requests()]


@pytest.mark.parametrize("speculate", ["off", 2, "lookup"])
def test_what_requests_get_in_company(bundle: Path, machine: Machine, speculate: str | int) -> None:
    machine()
    model = load(bundle, speculate=speculate)
    expected = texts(load(bundle, speculate="off"))
    with Engine.of(model, 2, prefix_memory=1 << 20) as engine:
        for _ in range(2):
            streams = [engine.submit(request) for request in requests()]
            assert [list(stream) for stream in streams] == expected
            assert {stream.statistics.finish for stream in streams} == {"length"}
        assert engine.statistics.prefix.hits >= len(SAMPLINGS)
        assert 0 < engine.statistics.state_bytes <= engine.statistics.cache_bytes <= engine.statistics.cache_limit
        left = engine.submit(requests()[1])
        got = [next(left) for _ in range(5)]
        left.cancel()
        got += list(left)
        assert left.statistics.finish == "cancelled" and got == expected[1][: len(got)] and len(got) < len(expected[1])
        late = requests()[0]
        late.deadline = 0.0
        stream = engine.submit(late)
        assert list(stream) == [] and stream.statistics.finish == "deadline"
        assert list(engine.submit(requests()[2])) == expected[2]


def test_the_longest_prompt_is_what_the_engines_were_built_for(bundle: Path, machine: Machine) -> None:
    machine()
    model = load(bundle, speculate="off")
    with Engine.of(model, 2) as engine:
        request = Request([5] * (CAPACITY - 3), Sampler(SAMPLINGS[0], 90), (), 3)
        assert len(list(engine.submit(request))) == 3
