"""An engine as its callers see it: threads, coroutines, cancellation, deadlines, errors, closing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from qwen_export.errors import ContextOverflow, OverloadedError, ParameterError, QwenExportError
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.serving.engine import Engine

CONTEXT = 160


@pytest.fixture(scope="module")
def model(demo_bundle: Path) -> Model:
    return load(demo_bundle, threads=1, max_context=CONTEXT, speculate="off")


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    with Engine.of(model, 4) as engine:
        yield engine


def request(start: int = 100, count: int = 20, new: int | None = 12, **options: object) -> Request:
    return Request(list(range(start, start + count)), Sampler(SamplingParams(greedy=True)), (), new, **options)  # type: ignore[arg-type]


def alone(model: Model, wanted: Request) -> list[int]:
    return list(model.generate(wanted, Statistics()))


def test_many_threads(model: Model, engine: Engine) -> None:
    results: dict[int, list[int]] = {}

    def read(start: int) -> None:
        results[start] = list(engine.submit(request(start)))

    threads = [threading.Thread(target=read, args=(start,)) for start in range(0, 100, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {start: alone(model, request(start)) for start in range(0, 100, 10)}


def test_coroutines_and_threads_beside_each_other(model: Model, engine: Engine) -> None:
    async def read(start: int) -> list[int]:
        return [token async for token in engine.submit(request(start), loop=asyncio.get_running_loop())]

    async def every() -> list[list[int]]:
        return await asyncio.gather(*(read(start) for start in range(0, 60, 10)))

    stream = engine.submit(request(7))
    assert asyncio.run(every()) == [alone(model, request(start)) for start in range(0, 60, 10)]
    assert list(stream) == alone(model, request(7))


def test_cancelled_while_it_waits_reads_and_answers(engine: Engine) -> None:
    streams = [engine.submit(request(start, new=100)) for start in range(0, 70, 10)]
    streams[-1].cancel()
    assert list(streams[-1]) == []
    got = [next(streams[0]), next(streams[0])]
    streams[0].cancel()
    rest = list(streams[0])
    assert streams[0].statistics.finish == streams[-1].statistics.finish == "cancelled"
    assert len(got) + len(rest) == streams[0].statistics.new_tokens < 100
    for stream in streams[1:-1]:
        assert len(list(stream)) == 100
        assert stream.statistics.finish == "length"


def test_a_forgotten_stream_gives_its_slot_back(model: Model) -> None:
    with Engine.of(model, 1) as engine:
        forgotten = engine.submit(request(new=None))
        next(forgotten)
        statistics = forgotten.statistics
        del forgotten
        assert list(engine.submit(request(50))) == alone(model, request(50))
        assert statistics.finish == "abandoned"


def test_a_deadline_ends_an_answer(engine: Engine) -> None:
    late = engine.submit(request(deadline=0.0))
    assert list(late) == []
    assert late.statistics.finish == "deadline"
    assert len(list(engine.submit(request(deadline=float("inf"))))) == 12


def test_the_context_is_full(model: Model, engine: Engine) -> None:
    stream = engine.submit(request(new=None))
    tokens: list[int] = []
    with pytest.raises(ContextOverflow, match="max_context"):
        tokens.extend(stream)
    assert stream.statistics.finish == "overflow"
    statistics = Statistics()
    expected: list[int] = []
    with pytest.raises(ContextOverflow):
        expected.extend(model.generate(request(new=None), statistics))
    assert (tokens, statistics.finish) == (expected, "overflow")
    with pytest.raises(ContextOverflow, match="longer than the context"):
        engine.submit(request(0, CONTEXT + 1))


def test_a_failing_call_ends_its_requests_only(model: Model) -> None:
    """One call of four rows fails once. Requests that come later get what they get alone."""
    made: list[Decoder] = []

    class Failing:
        armed = False

        def __call__(self, before: int, count: int, results: Mapping[str, object]) -> None:
            if self.armed:
                self.armed = False
                raise RuntimeError("no more memory")

    failing = Failing()

    def decoder() -> Decoder:
        made.append(model.decoder(4))
        made[0].observer = failing
        return made[0]

    with Engine(decoder) as engine:
        streams = [engine.submit(request(start, new=60)) for start in range(0, 40, 10)]
        for stream in streams:
            next(stream)
        failing.armed = True
        failed = 0
        for start, stream in zip(range(0, 40, 10), streams, strict=True):
            try:
                rest = list(stream)
                assert len(rest) == 59
                assert rest == alone(model, request(start, new=60))[1:]
            except QwenExportError as error:
                failed += 1
                assert "no more memory" in str(error)
                assert stream.statistics.finish == "error"
        assert failed
        assert list(engine.submit(request(90))) == alone(model, request(90))


def test_a_request_whose_sampler_fails_is_the_only_one(model: Model, engine: Engine) -> None:
    every = SamplingParams(suppress_tokens=tuple(range(model.manifest.model["vocab_size"])))
    good = engine.submit(request())
    bad = engine.submit(Request([1, 2, 3], Sampler(every), (), 5))
    with pytest.raises(QwenExportError, match="forbidden"):
        list(bad)
    assert list(good) == alone(model, request())


def test_too_many_wait(model: Model) -> None:
    with Engine.of(model, 1, max_waiting=1) as engine:
        streams = [engine.submit(request(new=100)) for _ in range(2)]
        with pytest.raises(OverloadedError, match="max_waiting"):
            engine.submit(request())
        assert [len(list(stream)) for stream in streams] == [100, 100]
        assert len(list(engine.submit(request()))) == 12


def test_closing(model: Model) -> None:
    engine = Engine.of(model, 2)
    stream = engine.submit(request(new=None))
    next(stream)
    engine.close()
    list(stream)
    assert stream.statistics.finish == "abandoned"
    with pytest.raises(QwenExportError, match="closed"):
        engine.submit(request())
    drained = Engine.of(model, 1)
    streams = [drained.submit(request(start)) for start in (0, 30)]
    drained.close(drain=True)
    assert [len(list(stream)) for stream in streams] == [12, 12]


def test_memory_of_ended_sequences_is_given_back(demo_bundle: Path) -> None:
    """With a bound, what a sequence used is free when it has left: otherwise each slot would keep what its longest text took."""
    psutil = pytest.importorskip("psutil")
    model = load(demo_bundle, threads=1, max_context=8192, speculate="off")
    process = psutil.Process()
    decoder = model.decoder()
    whole = decoder.growing_bytes(decoder.capacity + decoder.widest_verify)
    assert whole > 10 << 20
    decoder.prefill([5] * 256)
    before = process.memory_info().rss
    for buffer in decoder.states.values():  # type: ignore[attr-defined]
        buffer.write(buffer.read())  # every page in use
    full = process.memory_info().rss
    decoder.release()
    after = process.memory_info().rss
    assert full - before > whole // 2
    assert after - before < (full - before) // 4
    assert decoder.lengths == [0]
    decoder.prefill([5, 6, 7])


def test_memory_for_no_sequence_is_refused(model: Model) -> None:
    with pytest.raises(ParameterError, match="stall"):
        Engine.of(model, stall=1.0)
    with pytest.raises(ParameterError, match="cache_memory"):
        Engine.of(model, cache_memory=1000)
    with pytest.raises(ParameterError, match="prefix_memory"):
        Engine.of(model, cache_memory=1 << 30, prefix_memory=1 << 30)


def test_memory_is_reported_and_bounded(model: Model) -> None:
    """States of all slots, cache rows of the running sequences and beginnings of prompts stay together below the limit."""
    decoder = model.decoder(4)
    growing = decoder.growing_bytes(decoder.capacity + 1)
    limit = decoder.fixed_bytes + growing + decoder.growing_bytes(40) + (4 << 20)
    with Engine.of(model, 4, cache_memory=limit, prefix_memory=4 << 20) as engine:
        numbers, most = engine.statistics, 0
        assert (numbers.cache_limit, numbers.cache_bytes, numbers.state_bytes) == (limit, decoder.fixed_bytes, decoder.fixed_bytes)
        for stream in [engine.submit(request(start, mark_at=15, new=100)) for start in range(0, 40, 10)]:
            for _ in stream:
                most = max(most, numbers.cache_bytes)
                assert numbers.cache_bytes <= limit
        assert most > decoder.fixed_bytes + decoder.growing_bytes(40)
        assert numbers.prefix.points and numbers.sequence_bytes == {}


def test_answers_as_those_of_the_model(model: Model, engine: Engine) -> None:
    messages = [{"role": "user", "content": "def add(a, b):"}]
    sampling = SamplingParams(greedy=True)
    expected = "".join(model.stream(messages, sampling=sampling, max_new_tokens=20, enable_thinking=False))
    answer = engine.answer(model.prepare_chat(messages, sampling=sampling, max_new_tokens=20, enable_thinking=False))
    assert "".join(answer) == expected

    async def read() -> str:
        prepared = model.prepare_chat(messages, sampling=sampling, max_new_tokens=20, enable_thinking=False)
        return "".join([text async for text in engine.answer_async(prepared)])

    assert asyncio.run(read()) == expected


def test_a_stop_string_ends_the_request(model: Model, engine: Engine) -> None:
    prepared = model.prepare_text("def add(a, b):\n", sampling=SamplingParams(greedy=True), max_new_tokens=60)
    text = "".join(engine.answer(prepared))
    stop = text[3:6]
    answer = engine.answer(model.prepare_text("def add(a, b):\n", sampling=SamplingParams(greedy=True), max_new_tokens=60, stop=[stop]))
    assert "".join(answer) == text[: text.index(stop)]
    assert answer.statistics.finish == "stop"


def test_a_model_and_its_engine_answer_at_the_same_time(model: Model, engine: Engine) -> None:
    """Threads that use the model itself supersede each other and say so; an engine over the same graphs does not notice."""
    expected = {start: alone(model, request(start, new=40)) for start in range(0, 60, 10)}
    ends: list[tuple[int, list[int], str]] = []

    def own(start: int) -> None:
        for _ in range(4):
            statistics = Statistics()
            ends.append((start, list(model.generate(request(start, new=40), statistics)), statistics.finish))

    threads = [threading.Thread(target=own, args=(start,)) for start in (0, 10)]
    for thread in threads:
        thread.start()
    streams = {start: engine.submit(request(start, new=40)) for start in range(20, 60, 10)}
    assert {start: list(stream) for start, stream in streams.items()} == {start: expected[start] for start in streams}
    for thread in threads:
        thread.join()
    assert {finish for _, _, finish in ends} <= {"length", "superseded"}
    for start, tokens, finish in ends:
        assert tokens == expected[start][: len(tokens)] and (finish == "superseded" or len(tokens) == 40)
