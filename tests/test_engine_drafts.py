"""Steps of an engine with drafts: how many calls of the graph they take."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.serving.engine import Engine
from tests.support.kernel_families import needs_plugin

STREAMS, NEW = 4, 40


@needs_plugin
@pytest.mark.parametrize(("drafts", "most"), [(2, 1.5), ("lookup", 2.5)])
def test_a_step_verifies_all_rows_in_one_call(demo_bundle: Path, drafts: int | str, most: float) -> None:
    """Some calls more than steps: prompts, and rows with so many tokens more or less that padding would cost more than a call."""
    calls = 0

    def counted(*_: object) -> None:
        nonlocal calls
        calls += 1

    with load(demo_bundle, threads=1, speculate=drafts, max_context=256) as model:

        def decoder() -> Decoder:
            made = model.decoder(STREAMS, drafts=drafts != "lookup")
            made.observer = counted
            return made

        def request(start: int) -> Request:
            sampler = Sampler(SamplingParams(greedy=True), model.tokenizer.vocab_size)
            return Request([*range(start, start + 16)] * 2, sampler, (), NEW)

        with Engine(decoder, drafts=drafts, prefix_memory=0) as engine:
            streams = [engine.submit(request(100 + 50 * number)) for number in range(STREAMS)]
            texts = [list(stream) for stream in streams]
            steps = engine.statistics.steps
        assert [len(text) for text in texts] == [NEW] * STREAMS
        drafted = sum(sum(stream.statistics.speculation.drafted) for stream in streams)
    assert drafted > 0 and steps < NEW + 10
    assert calls <= most * steps
