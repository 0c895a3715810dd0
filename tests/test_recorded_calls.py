"""Calls that come again on a GPU: one launch and one wait each, the same results, and failures where they happen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

from qwen_export.errors import BundleError, ContextOverflow, QwenExportError
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.memory.buffers import as_bytes
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer
from qwen_export.runtimes.memory.cuda_stream import device_stream
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.serving.engine import Engine
from tests.support.cuda_sessions import cuda_sessions
from tests.support.fake_driver import FakeDriver
from tests.support.greedy import greedy_steps

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture
def model(demo_bundle: Path, driver: FakeDriver) -> Iterator[Model]:
    with cuda_sessions(), load(demo_bundle, device="cuda", threads=1, max_context=128) as model:
        yield model


def text(decoder: Decoder) -> list[int]:
    """Steps, a verify with its drafts, and steps from marks on."""
    decoder.prefill(PROMPT)
    made = greedy_steps(decoder, 3, 4)
    mark = decoder.mark(on_device=True)
    made += [row.argmax() for row in decoder.verify([made[-1], 4, 5])]
    decoder.accept(2)
    made += greedy_steps(decoder, 7, 3)
    decoder.rewind(mark)
    return made + greedy_steps(decoder, 7, 3)


def test_a_step_is_one_launch_and_one_wait(demo_bundle: Path, model: Model, driver: FakeDriver) -> None:
    decoder = model.decoder()
    assert text(decoder) == text(load(demo_bundle, threads=1, max_context=128).decoder())
    before = driver.launches, driver.waits
    greedy_steps(decoder, 3, 5)
    assert (driver.launches - before[0], driver.waits - before[1]) == (5, 5)


def test_a_call_that_fails_says_so_itself(model: Model, driver: FakeDriver) -> None:
    decoder = model.decoder()
    decoder.prefill(PROMPT)
    greedy_steps(decoder, 3, 2)
    driver.fault = 700
    with pytest.raises(BundleError, match="cuEventSynchronize"):
        decoder.step([4])
    driver.fault = 0
    with pytest.raises(QwenExportError, match="interrupted"):
        decoder.step([4])
    decoder.reset()
    decoder.prefill(PROMPT)
    assert len(greedy_steps(decoder, 3, 2)) == 2


def test_a_step_in_two_halves(model: Model) -> None:
    """Until the second half the sequence is not settled."""
    decoder, other = model.decoder(), model.decoder()
    for one in (decoder, other):
        one.prefill(PROMPT)
    landing = decoder.launch([3])
    with pytest.raises(QwenExportError, match="interrupted"):
        decoder.step([4])
    assert landing()[0].argmax() == other.step([3])[0].argmax() and decoder.tokens() == (*PROMPT, 3)


def test_what_other_threads_do_is_not_recorded(driver: FakeDriver) -> None:
    stream, recording, values = device_stream(0), threading.Event(), np.arange(8, dtype=np.uint8)
    buffer = CudaBuffer("uint8", (8,))

    def write() -> None:
        recording.wait()
        buffer.write(as_bytes(values))

    def meanwhile() -> None:
        recording.set()
        thread.join(0.05)

    thread = threading.Thread(target=write)
    thread.start()
    with stream.turn:
        recorded = stream.record(meanwhile)
    thread.join()
    assert buffer.read().tolist() == values.tolist()
    buffer.zero(0, 8)
    recorded.launch()
    assert not buffer.read().any()


def test_an_answer_that_its_reader_ends(demo_bundle: Path, driver: FakeDriver) -> None:
    """The round that is under way then is waited for, and the next answer is what it would be anyway."""

    def answers(model: Model) -> list[list[int]]:
        vocabulary, made = model.manifest.model["vocab_size"], []
        for seed, wanted, stops in ((1, 4, ()), (2, 9, ()), (1, 9, (0, 1, 2)), (1, 3, ())):
            sampling = SamplingParams(temperature=0.9, top_k=20, seed=seed)
            request = Request([*PROMPT, *chain(*made)], Sampler(sampling, vocabulary), stops, 8)
            with closing(model.generate(request, Statistics())) as tokens:
                made.append(list(islice(tokens, wanted)))
        return made

    expected = answers(load(demo_bundle, threads=1, max_context=128, speculate="off"))
    with cuda_sessions(), load(demo_bundle, device="cuda", threads=1, max_context=128, speculate="off") as model:
        assert answers(model) == expected and list(map(len, expected)) == [4, 8, 8, 3]


def test_steps_that_are_launched_ahead_change_no_answer(demo_bundle: Path, model: Model) -> None:
    """Answers that end after different numbers of tokens, at a stop token, or by their reader; others come while these run."""
    ways = [SamplingParams(greedy=True), SamplingParams(temperature=0.9, top_k=20, seed=3), SamplingParams(temperature=0.9, seed=4)]

    def answers(model: Model) -> list[list[int]]:
        vocabulary = model.manifest.model["vocab_size"]
        with Engine(lambda: model.decoder(4), prefix_memory=0, drafts="off") as engine:
            left = engine.submit(Request(PROMPT, Sampler(ways[0], vocabulary), (), None))
            streams = [engine.submit(Request(PROMPT[n % 3 :], Sampler(ways[n % 3], vocabulary), (), 5 + 3 * n)) for n in range(7)]
            read = [next(left) for _ in range(4)]
            left.close()
            made = [list(stream) for stream in streams]
            stops = engine.submit(Request(PROMPT, Sampler(ways[0], vocabulary), (read[3],), 30))
            return [read, *made, list(stops)]

    expected = answers(load(demo_bundle, threads=1, max_context=128))
    assert answers(model) == expected and [len(one) for one in expected[1:8]] == [5 + 3 * n for n in range(7)]


def test_a_full_context_ends_its_own_answer_only(demo_bundle: Path, model: Model) -> None:
    def answers(model: Model) -> tuple[list[int], list[int]]:
        sampler, long = Sampler(SamplingParams(greedy=True), model.manifest.model["vocab_size"]), []
        with Engine(lambda: model.decoder(2), prefix_memory=0, drafts="off") as engine:
            full = engine.submit(Request([5] * 90, sampler, (), None))
            other = engine.submit(Request(PROMPT, sampler, (), 70))
            with pytest.raises(ContextOverflow):
                long += iter(full)
            return long, list(other)

    expected = answers(load(demo_bundle, threads=1, max_context=128))
    assert answers(model) == expected and len(expected[1]) == 70


def test_a_closed_model_runs_nothing(demo_bundle: Path, driver: FakeDriver) -> None:
    with cuda_sessions(), load(demo_bundle, device="cuda", threads=1, max_context=128) as model:
        decoder = model.decoder()
        decoder.prefill(PROMPT)
        greedy_steps(decoder, 3, 3)
    with pytest.raises(QwenExportError, match="closed"):
        decoder.step([4])
