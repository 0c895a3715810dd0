"""Graphs of fixed shapes take one sequence: an engine gives its requests turns, through the same interface and with the same texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_export import build
from qwen_export.runtimes import Model, load
from qwen_export.runtimes.serving.engine import Engine
from tests.support.engine_schedules import alone, differences, together, visits


@pytest.fixture(scope="module")
def bundle(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(demo_checkpoint, tmp_path_factory.mktemp("static") / "onnx", target="onnx", max_context=320)


@pytest.mark.parametrize("speculate", ["off", 2])
def test_turns_give_the_same_texts(bundle: Path, speculate: str | int) -> None:
    single: Model = load(bundle, threads=1, speculate="off")
    model = single if speculate == "off" else load(bundle, threads=1, speculate=speculate)
    schedule = visits(single, 5, 6, 120, 24)
    expected = [alone(single, visit) for visit in schedule]
    with Engine.of(model, 3) as engine:
        assert differences(expected, together(engine, model, schedule)) == []
        again = together(engine, model, schedule)
        assert differences(expected, again) == []
        assert engine.statistics.prefix.hits > 0
