"""Recorded calls on a real GPU: each brings its tokens there and its results back by itself, whatever happens between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qwen_export.runtimes import Model, SamplingParams
from qwen_export.runtimes.decoding.generation import Request
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.serving.engine import Engine
from tests.support.greedy import greedy_steps
from tests.support.longer_context import on_gpu

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with on_gpu(demo_checkpoint, 5000, tmp_path_factory.mktemp("recorded")) as model:
        yield model


def test_marks_rewinds_and_growth_in_between(model: Model) -> None:
    """The rows of a step are those of the same text read at once, and what was rewound comes again to the last bit."""
    ids = np.random.default_rng(0).integers(10, 200, 2030).tolist()
    decoder, whole = model.decoder(drafts=True), model.decoder()
    decoder.prefill(ids)
    made = [7, *greedy_steps(decoder, 7, 10)]
    for on_device in (False, True):
        mark, snapshot = decoder.mark(on_device=on_device), decoder.snapshot(on_device=on_device)
        expected = greedy_steps(decoder, made[-1], 8)
        decoder.rewind(mark)
        assert greedy_steps(decoder, made[-1], 8) == expected
        decoder.restore(snapshot)
        decoder.verify([made[-1], *expected[:2]])
        decoder.accept(3)
        for token in expected[2:7]:
            decoder.step([token])
        made += expected[:8]
    for _ in range(12):  # across the end of caches that double
        made += greedy_steps(decoder, made[-1], 1)
    assert decoder.tokens() == (*ids, *made[:-1])
    got = decoder.step([made[-1]])[0].copy()
    np.testing.assert_allclose(got, whole.prefill([*ids, *made]), atol=0.05)


def test_steps_of_an_engine_are_those_of_a_decoder(model: Model) -> None:
    """Launched ahead or not, greedy answers of several lengths are those of steps one by one. One slot: more rows may round otherwise."""
    vocabulary = model.manifest.model["vocab_size"]
    prompts = [list(range(10 + n, 40 + 2 * n)) for n in range(6)]
    with Engine(lambda: model.decoder(1), prefix_memory=0, drafts="off") as engine:
        streams = [
            engine.submit(Request(ids, Sampler(SamplingParams(greedy=True), vocabulary), (), 20 + 5 * n)) for n, ids in enumerate(prompts)
        ]
        answers = [list(stream) for stream in streams]
    decoder = model.decoder(1)
    for n, ids in enumerate(prompts):
        decoder.reset()
        first = int(decoder.prefill(ids).argmax())
        assert [first, *greedy_steps(decoder, first, 19 + 5 * n)] == answers[n]
