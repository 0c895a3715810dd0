"""What a request gets from an engine does not depend on who else runs: token for token what a model alone gives, in fp32 on the CPU.

`--schedules 500 --longest-prompt 2000` runs the long form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_export import build
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.serving.engine import Engine
from tests.support.engine_schedules import Visit, alone, differences, together, visits

SLOTS, VISITS = 4, 8


@pytest.fixture(scope="module")
def bundles(demo_bundle: Path, demo_moe_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    moe = tmp_path_factory.mktemp("engine") / "moe"

    @functools.cache
    def bundle(kind: str) -> Path:
        return demo_bundle if kind == "dense" else build(demo_moe_checkpoint, moe)

    return bundle


@pytest.fixture(scope="module")
def models(bundles: Callable[[str], Path], request: pytest.FixtureRequest) -> Callable[[str, str | int], Model]:
    context = int(request.config.getoption("--longest-prompt")) + 100

    @functools.cache
    def model(kind: str, speculate: str | int) -> Model:
        return load(bundles(kind), threads=1, speculate=speculate, max_context=context)

    return model


@pytest.mark.parametrize(
    ("kind", "speculate"),
    [
        *(("dense", way) for way in ("off", 3, "auto", "lookup")),
        ("moe", 3),
        *(pytest.param("moe", way, marks=pytest.mark.slow) for way in ("off", "auto", "lookup")),
    ],
)
def test_together_as_alone(
    models: Callable[[str, str | int], Model], kind: str, speculate: str | int, request: pytest.FixtureRequest
) -> None:
    """Arrivals, cancellations, shared beginnings, seeds; with little memory running sequences are preempted, and points evicted."""
    schedules, longest = (int(request.config.getoption(name)) for name in ("--schedules", "--longest-prompt"))
    single, model = models(kind, "off"), models(kind, speculate)
    for seed in range(schedules):
        schedule = visits(single, seed, VISITS, longest, 40)
        expected = [alone(single, visit) for visit in schedule]
        decoder = model.decoder(drafts=isinstance(speculate, int) or speculate == "auto")
        whole, prefix = decoder.growing_bytes(decoder.capacity + decoder.widest_verify), (1 << 20) << (10 * (seed % 2))
        memory = SLOTS * decoder.fixed_bytes + whole + decoder.growing_bytes(longest // 3) + prefix if seed % 2 == 0 else None
        with Engine.of(model, SLOTS, cache_memory=memory, prefix_memory=prefix, reserve=0) as engine:
            got = together(engine, model, schedule)
        assert differences(expected, got) == [], f"schedule {seed}"


@pytest.mark.parametrize("speculate", ["off", 3])
def test_preempted_and_back(models: Callable[[str, str | int], Model], speculate: str | int) -> None:
    """Memory for some two sequences, which all grow: the younger ones leave and come back, and nothing changes."""
    single, model = models("dense", "off"), models("dense", speculate)
    schedule = [Visit(list(range(10 + 3 * i, 30 + i)), SamplingParams(seed=i, top_k=20), 70, None, 0, None) for i in range(4)]
    decoder = model.decoder(drafts=speculate != "off")
    growing = max(decoder.growing_bytes(decoder.capacity + decoder.widest_verify), 2 * decoder.growing_bytes(80))
    with Engine.of(model, SLOTS, cache_memory=SLOTS * decoder.fixed_bytes + growing, prefix_memory=0, reserve=0) as engine:
        got = together(engine, model, schedule)
        assert engine.statistics.preemptions > 0
    assert differences([alone(single, visit) for visit in schedule], got) == []


@pytest.mark.parametrize("speculate", [3, "lookup"])
def test_prompts_of_one_token(models: Callable[[str, str | int], Model], speculate: str | int) -> None:
    """Nothing is read before the first step, so there is nothing to draft after."""
    single, model = models("dense", "off"), models("dense", speculate)
    schedule = [Visit([token], SamplingParams(greedy=True), 12, None, 0, None) for token in (5, 6, 7)]
    with Engine.of(model, SLOTS) as engine:
        assert differences([alone(single, visit) for visit in schedule], together(engine, model, schedule)) == []


def test_prompts_as_long_that_arrive_together(models: Callable[[str, str | int], Model]) -> None:
    """Their beginnings are read in one call, as far as they are as long."""
    single, model = models("dense", "off"), models("dense", 3)
    schedule = [Visit(list(range(50 * i, 50 * i + 24 + i // 3)), SamplingParams(greedy=True), 8, None, 0, None) for i in range(6)]
    with Engine.of(model, 6) as engine:
        assert differences([alone(single, visit) for visit in schedule], together(engine, model, schedule)) == []
