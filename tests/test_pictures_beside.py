"""Pictures in the engine are encoded beside its steps: what others get meanwhile, and what failures and cancellations end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_export.errors import QwenExportError
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.generation import Request
from qwen_export.runtimes.decoding.prompt_pictures import Features
from qwen_export.runtimes.decoding.stop_signal import StopSignal
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.vision.chat_media import MediaOptions
from qwen_export.runtimes.vision.picture import open_picture
from tests.support.pictures import photo

SMALL = MediaOptions(min_pixels=32 * 32, max_pixels=96 * 96)
Around = Callable[[Callable[[], Features], StopSignal | None], Features]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[Model]:
    with load(tiny_bundle, threads=1, speculate="off") as loaded:
        yield loaded


def request(model: Model, *parts: Any, tokens: int = 8, around: Around | None = None) -> Request:
    """Of texts and pictures; `around` gets what encodes a picture, and the signal that it may be stopped with."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts]
    chat = [{"role": "user", "content": content}]
    made = model.prepare_chat(chat, sampling=SamplingParams(greedy=True), max_new_tokens=tokens, media=SMALL).request
    if around is not None and made.pictures is not None:
        seen = [replace(one, features=lambda stop=None, one=one: around(lambda: one.features(stop), stop)) for one in made.pictures.seen]
        made.pictures = replace(made.pictures, seen=tuple(seen))
    return made


def test_others_get_their_tokens_while_a_picture_is_encoded(model: Model) -> None:
    """The text before the picture is read, too; the answer is that of the picture alone."""
    go_on, read = threading.Event(), [0]

    def late(encode: Callable[[], Features], stop: StopSignal | None) -> Features:
        assert go_on.wait(60)
        return encode()

    with Engine.of(model, 2) as engine:
        parts = ("some text before it ", photo(64, 96, 3), " and behind")
        expected = list(engine.submit(request(model, *parts)))
    with Engine.of(model, 2) as engine:
        seeing = request(model, *parts, around=late)
        seeing.progress = lambda done, total: read.append(done)
        slow = engine.submit(seeing)
        assert len(list(engine.submit(request(model, "only text", tokens=24)))) == 24
        assert seeing.pictures is not None and read[-1] == seeing.pictures.seen[0].places[0]
        assert not slow.statistics.finish
        go_on.set()
        assert list(slow) == expected


def test_several_pictures_are_read_as_they_come(model: Model) -> None:
    parts = ("a ", photo(64, 64, 1), " b ", photo(32, 96, 2), photo(32, 32, 3), " c")
    steps = [threading.Event() for _ in range(3)]
    waiting = iter(steps)

    def stepwise(encode: Callable[[], Features], stop: StopSignal | None) -> Features:
        assert next(waiting).wait(60)
        return encode()

    with Engine.of(model, 1) as engine:
        expected = list(engine.submit(request(model, *parts)))
    with Engine.of(model, 1) as engine:
        seeing, read = request(model, *parts, around=stepwise), threading.Semaphore(0)
        seeing.progress = lambda done, total: read.release()
        stream = engine.submit(seeing)
        for step in steps:
            assert read.acquire(timeout=60)  # up to the picture that is missing
            step.set()
        assert list(stream) == expected


def test_a_picture_that_fails_ends_its_request_alone(model: Model) -> None:
    def broken(encode: Callable[[], Features], stop: StopSignal | None) -> Features:
        raise QwenExportError("the tower is broken", fix="Mend it.")

    with Engine.of(model, 3) as engine:
        other = engine.submit(request(model, "text ", photo(64, 64), tokens=24))
        failing = engine.submit(request(model, "text ", photo(64, 64, 9), around=broken))
        with pytest.raises(QwenExportError, match="the tower is broken"):
            list(failing)
        assert failing.statistics.finish == "error" and len(list(other)) == 24
        assert len(list(engine.submit(request(model, "again ", photo(64, 64, 9))))) == 8


class Endless:
    """A tower that ends when it is stopped, and not before."""

    def __init__(self) -> None:
        self.begun, self.stopped = threading.Event(), threading.Event()

    def __call__(self, encode: Callable[[], Features], stop: StopSignal | None) -> Features:
        assert stop is not None
        with stop.ends(self.stopped.set):
            self.begun.set()
            assert self.stopped.wait(60)
        raise QwenExportError("stopped", fix="Nothing.")


@pytest.mark.parametrize("way", ["cancelled", "deadline"])
def test_a_request_that_ends_stops_its_picture(model: Model, way: str) -> None:
    endless = Endless()
    with Engine.of(model, 2) as engine:
        seeing = request(model, "a ", photo(64, 64, 4), photo(64, 64, 5), around=endless)
        if way == "deadline":
            seeing.deadline = 0.0
        stream = engine.submit(seeing)
        if way == "cancelled":
            assert endless.begun.wait(60)
            stream.cancel()
        assert list(stream) == [] and stream.statistics.finish == way
        assert way == "deadline" or endless.stopped.wait(60)
        assert len(list(engine.submit(request(model, "b ", photo(64, 64, 6))))) == 8


def test_an_engine_that_closes_stops_its_pictures(model: Model) -> None:
    endless = Endless()
    engine = Engine.of(model, 1)
    stream = engine.submit(request(model, photo(64, 64, 4), around=endless))
    assert endless.begun.wait(60)
    engine.close()
    assert list(stream) == [] and stream.statistics.finish == "abandoned"


def test_one_picture_of_many_requests_is_encoded_once(tiny_bundle: Path) -> None:
    with load(tiny_bundle, threads=1) as model, Engine.of(model, 4) as engine:
        streams = [engine.submit(request(model, f"{number} ", photo(96, 96))) for number in range(8)]
        assert [len(list(stream)) for stream in streams] == [8] * 8
        assert model.sight is not None and model.sight.encoder.encoded == 1


def test_a_call_of_the_tower_can_be_stopped(model: Model) -> None:
    """And the next one is whole."""
    assert model.sight is not None
    encoder, picture = model.sight.encoder, open_picture(photo(768, 768, 7), model.sight.spec)
    stop = StopSignal()
    stop.give()
    with pytest.raises(QwenExportError):
        encoder.features(picture, stop)
    made = encoder.features(picture)
    assert np.isfinite(made.view(np.float32)).all()


def test_requests_that_lose_their_slots_see_the_same(tiny_bundle: Path) -> None:
    """Memory for one context: the youngest leave, before or behind their pictures."""
    with load(tiny_bundle, threads=1, speculate="off", max_context=128) as model:
        parts = [("first text ", photo(64, 96, seed), " then ", photo(96, 64, seed + 10), f" {seed}") for seed in range(4)]
        with Engine.of(model, 1) as engine:
            expected = [list(engine.submit(request(model, *one, tokens=40))) for one in parts]
        decoder = model.decoder(4)
        least = decoder.fixed_bytes + decoder.growing_bytes(decoder.capacity + 16)
        with Engine.of(model, 4, cache_memory=least, prefix_memory=0, reserve=1) as engine:
            streams = [engine.submit(request(model, *one, tokens=40)) for one in parts]
            assert [list(stream) for stream in streams] == expected
            assert engine.statistics.preemptions
