"""Answers that end in the middle: interrupted, failed, cancelled, superseded, closed. The next answer is what a fresh model gives."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from qwen_export import build
from qwen_export.errors import BundleError, ContextOverflow, QwenExportError
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_session import OnnxRuntimeCall
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.decoding.sequence import Media, Prompt
from qwen_export.runtimes.sampling.sampler import Sampler
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer

GREEDY = SamplingParams(greedy=True)
PROMPT = list(range(5, 35))
KINDS = ("dynamic", "static")


@pytest.fixture(scope="module")
def open_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    directory = tmp_path_factory.mktemp("interrupted")
    tokenizer = write_tiny_tokenizer(directory / "tokenizer")
    checkpoint = synthesize(tiny_config(vision=False), directory / "checkpoint", tokenizer=tokenizer)
    bundles = {"dynamic": build(checkpoint, directory / "dynamic"), "static": build(checkpoint, directory / "static", target="onnx")}
    return lambda kind, **options: load(bundles[kind], threads=1, **({"max_context": 96} | options))


class Failure(Exception):
    """Raised where no library of ours would."""


@contextmanager
def failing_call(number: int, kind: type[BaseException]) -> Iterator[list[int]]:
    """Call `number` of the backend, counted from 0, runs and then raises. Yields the count so far."""
    count = [0]
    run = OnnxRuntimeCall.run

    def counted(self: OnnxRuntimeCall) -> None:
        run(self)
        count[0] += 1
        if count[0] == number + 1:
            raise kind("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntimeCall, "run", counted)
        yield count


def answer(model: Model, tokens: int = 12) -> tuple[list[int], Statistics]:
    statistics = Statistics()
    request = Request(PROMPT, Sampler(GREEDY), (), tokens)
    return list(model.generate(request, statistics)), statistics


@pytest.mark.parametrize(
    ("kind", "speculate"),
    [
        *(("dynamic", speculate) for speculate in ("off", 3, "lookup")),
        ("static", 3),
        *(pytest.param("static", speculate, marks=pytest.mark.slow) for speculate in ("off", "lookup")),
    ],
)
def test_an_interrupt_at_any_call_leaves_no_trace(open_model: Callable[..., Model], kind: str, speculate: str | int) -> None:
    """The backend has written states, and what was read is not counted yet: reading on from there would read tokens twice."""
    wanted, _ = answer(open_model(kind, speculate=speculate))
    model = open_model(kind, speculate=speculate)
    with failing_call(10**9, KeyboardInterrupt) as count:
        assert answer(model)[0] == wanted
    for number in range(0, count[0], 1 if count[0] < 24 else 3):
        with failing_call(number, KeyboardInterrupt) as reached:
            statistics = Statistics()
            with pytest.raises(KeyboardInterrupt):
                list(model.generate(Request(PROMPT, Sampler(GREEDY), (), 12), statistics))
                raise KeyboardInterrupt if reached[0] <= number else AssertionError("the answer went on")
        assert statistics.finish in ("error", "length")
        assert answer(model)[0] == wanted, f"after call {number}"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_inside_a_round_arrives_as_it_is(open_model: Callable[..., Model], kind: str) -> None:
    """Whatever a call or a choice of a token raises reaches the caller, and the decoder is where plain decoding is, or not settled."""
    model = open_model(kind, speculate=3)
    wanted, _ = answer(model)
    choose = Sampler.distribution
    for number in range(8):
        count = [0]

        def failing(self: Sampler, *arguments: object, count: list[int] = count, number: int = number) -> object:
            count[0] += 1
            if count[0] == number + 1:
                raise Failure("NaN")
            return choose(self, *arguments)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Failure, match="NaN"):
            patch.setattr(Sampler, "distribution", failing)
            answer(model, 40)
        assert answer(model)[0] == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_an_unsettled_sequence_is_refused_until_it_goes_back(open_model: Callable[..., Model], kind: str) -> None:
    decoder = open_model(kind).decoder(2)
    for slot in range(2):
        decoder.prefill(PROMPT[:4], slot, want_logits=False)
    mark = decoder.mark()
    with failing_call(0, Failure), pytest.raises((Failure, BundleError)):
        decoder.run([Read(0, [7])])
    for call in (lambda: decoder.step([1, 2]), decoder.mark, decoder.snapshot, lambda: decoder.accept(0)):
        with pytest.raises(QwenExportError, match="interrupted"):
            call()
    expected = decoder.run([Read(1, [9])])[0].array[0].copy()  # the other sequence goes on
    decoder.rewind(mark)
    np.testing.assert_allclose(decoder.run([Read(0, [9])])[0].array[0], expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_cancelled_between_two_parts_and_resumed(open_model: Callable[..., Model], kind: str) -> None:
    model = open_model(kind, max_context=4096 if kind == "dynamic" else 2048)
    chunk = model.decoder().chunk
    ids = [3 + i % 90 for i in range(3 * chunk + 5)]
    seen: list[tuple[int, int]] = []
    request = Request(ids, Sampler(GREEDY), (), 3)

    def cancel(read: int, whole: int) -> None:
        seen.append((read, whole))
        if read:
            request.cancelled.set()

    request.progress = cancel
    statistics = Statistics()
    assert list(model.generate(request, statistics)) == [] and statistics.finish == "cancelled"
    assert seen == [(0, len(ids)), (chunk, len(ids))]
    again = Statistics()
    tokens = list(model.generate(Request(ids, Sampler(GREEDY), (), 3), again))
    assert again.reused_tokens == chunk, "what was read stays read"
    fresh = open_model(kind, max_context=4096 if kind == "dynamic" else 2048)
    assert tokens == list(fresh.generate(Request(ids, Sampler(GREEDY), (), 3), Statistics()))


def test_how_an_answer_ended_is_always_said(open_model: Callable[..., Model]) -> None:
    model = open_model("dynamic")
    first, second, third = (model.complete("abc", sampling=GREEDY, max_new_tokens=30) for _ in range(3))
    assert [g.statistics.finish for g in (first, second)] == ["superseded", "superseded"]
    assert list(first) == [] and list(second) == []
    texts = iter(third)
    next(texts)
    assert third.statistics.finish == ""
    model.complete("abd", sampling=GREEDY, max_new_tokens=3)
    assert third.statistics.finish == "superseded" and list(texts) == []
    request, statistics = Request(PROMPT, Sampler(GREEDY), (), 9), Statistics()
    tokens = model.generate(request, statistics)
    next(tokens)
    tokens.close()
    assert statistics.finish == "abandoned"
    statistics = Statistics()
    with pytest.raises(ContextOverflow):
        list(model.generate(Request(PROMPT, Sampler(GREEDY), ()), statistics))
    assert statistics.finish == "overflow"


def test_two_threads_on_one_model_take_turns(open_model: Callable[..., Model]) -> None:
    """The later answer ends the earlier one, wherever it is, and is right."""
    model = open_model("dynamic", speculate="off")
    wanted, _ = answer(model, 20)
    results: list[tuple[list[int], str]] = []
    lock = threading.Lock()

    def work() -> None:
        for _ in range(15):
            tokens, statistics = answer(model, 20)
            with lock:
                results.append((tokens, statistics.finish))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 60 and {finish for _, finish in results} <= {"length", "superseded"}
    assert all(tokens == wanted[: len(tokens)] for tokens, _ in results)
    assert all(tokens == wanted for tokens, finish in results if finish == "length")
    assert answer(model, 20)[0] == wanted


def test_prompts_are_told_apart_by_their_media(open_model: Callable[..., Model]) -> None:
    """Pictures share the ids of their placeholders."""
    reuse = PrefixReuse(open_model("dynamic").decoder())
    cat, dog = (Prompt(tuple(PROMPT), (Media(4, 6, digest),)) for digest in (b"cat", b"dog"))
    assert reuse.read(cat, 20).reused == 0
    longer = Prompt((*cat.ids, 7, 8), cat.media)
    assert reuse.read(longer, 31).reused == len(PROMPT)
    assert reuse.read(Prompt((*dog.ids, 7, 8), dog.media)).reused == 0
    assert reuse.read(Prompt((*dog.ids[:20], 9), dog.media)).reused == 0
    assert reuse.read(Prompt((*dog.ids[:20], 9, 10), dog.media)).reused == 21


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_model_says_so(open_model: Callable[..., Model], kind: str) -> None:
    with open_model(kind) as model:
        running = model.generate(Request(PROMPT, Sampler(GREEDY), (), 9), statistics := Statistics())
        next(running)
        decoder = model.decoder()
    assert statistics.finish == "abandoned" and list(running) == []
    for call in (model.decoder, model.warm, lambda: answer(model), lambda: decoder.step([1])):
        with pytest.raises(QwenExportError, match="closed"):
            call()
    model.close()
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(QwenExportError, match="cannot be pickled or copied"):
            copied(model)  # type: ignore[operator]


def test_a_closed_model_gives_its_memory_back(tmp_path: Path) -> None:
    """Caches of a long context and weights, of one model after the other."""
    code = """
import sys
from qwen_export.runtimes import load
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
for i in range(4):
    with load(sys.argv[1], threads=1, max_context=4096) as model:
        model.decoder().prefill([1] * 200)
    if i == 0:
        first = resident()
print(resident() - first)
"""
    import subprocess
    import sys

    config = tiny_config(vision=False, vocab_size=100_000)
    bundle = build(synthesize(config, tmp_path / "checkpoint"), tmp_path / "bundle")
    grown = float(subprocess.run([sys.executable, "-c", code, str(bundle)], check=True, capture_output=True, text=True).stdout)
    assert grown < 8, "MB"
