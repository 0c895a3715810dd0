"""Caches on a GPU that grow for each sequence alone, on a driver whose addresses without memory hold NaN.

The bundle's attention costs by the rows allocated; its manifest is changed, as if it did not."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen_export.errors import BundleError
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.memory.growing_buffer import GrowingBuffer
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.serving.engine import Engine
from tests.support.cuda_sessions import cuda_sessions
from tests.support.fake_driver import PAGE, FakeDriver

CONTEXT = 200
PREFIXES = 4 << 20


@pytest.fixture
def model(demo_bundle: Path, driver: FakeDriver) -> Iterator[Model]:
    with cuda_sessions():
        model = load(demo_bundle, device="cuda", device_id=1, threads=1, max_context=CONTEXT, speculate=2)
        model.manifest = replace(model.manifest, target=replace(model.manifest.target, operators=()))
        yield model
        model.close()


def test_pages_come_and_go_with_the_rows(driver: FakeDriver) -> None:
    """One slot's rows take no memory for another's, new ones are zero, and addresses stay."""
    step = PAGE // 64
    buffer = GrowingBuffer("float16", (3, 2, 4 * step, 32))
    assert (buffer.step, driver.used) == (step, 0)
    buffer.hold(1, 1)
    assert driver.used == buffer.bytes_for(1) == 2 * PAGE
    address, rows = buffer.address, buffer.row_bytes
    buffer.write(np.full(100, 7, np.uint8), rows)
    buffer.hold(1, step + 1)
    assert driver.used == buffer.bytes_for(step + 1) == 4 * PAGE
    assert (buffer.address, buffer.held(1), buffer.held(0)) == (address, 2 * step, 0)
    assert buffer.read(rows, 100).tolist() == [7] * 100
    assert not buffer.read(rows + PAGE, PAGE).any()
    with pytest.raises(AssertionError, match="illegal"):
        buffer.read(0, 1)
    buffer.hold(1, 1)
    assert driver.used == 2 * PAGE
    buffer.hold(1, 0)
    del buffer
    gc.collect()
    assert not driver.handles and not driver.reserved


def test_rows_that_do_not_fill_pages(driver: FakeDriver) -> None:
    """Rows of int8 with their factor: S is a multiple of what fills pages, so that no head shares one, and memory comes by the page."""
    buffer = GrowingBuffer("int8", (2, 2, 512, 80))
    assert (buffer.step, driver.used) == (PAGE // 80, 0)
    buffer.hold(1, buffer.step + 1)
    assert driver.used == buffer.bytes_for(buffer.step + 1) == 4 * PAGE
    assert buffer.held(1) == 2 * PAGE // 80
    last = buffer.row_bytes + (buffer.held(1) - 1) * 80
    buffer.write(np.full(80, 7, np.uint8), last)
    assert buffer.read(last, 80).tolist() == [7] * 80
    buffer.hold(1, 0)
    assert driver.used == 0
    with pytest.raises(AssertionError, match="no multiple"):
        GrowingBuffer("int8", (2, 2, 511, 80))


def logits_of(decoder: Decoder, slot: int) -> list[np.ndarray]:
    """A long prompt, a verify of which some is kept, and steps."""
    made = [decoder.prefill(range(5, CONTEXT - 10), slot).copy()]
    [rows] = decoder.run([Read(slot, [1, 2, 3], commit=False, logits=3)])
    made += list(rows.array[:3].copy())
    decoder.accept(2, slot)
    for token in range(4):
        [rows] = decoder.run([Read(slot, [token])])
        made.append(rows.array[0].copy())
    return made


def test_a_sequence_grows_without_the_others(model: Model, demo_bundle: Path, driver: FakeDriver) -> None:
    """What a long text takes is given back when it is released, and logits are those of memory that was there from the start."""
    decoder, plain = model.decoder(3, drafts=True), load(demo_bundle, threads=1, max_context=CONTEXT).decoder(3, drafts=True)
    at_first = driver.mapped_bytes
    assert decoder.fixed_bytes >= at_first > 0
    for got, expected in zip(logits_of(decoder, 1), logits_of(plain, 1), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)
    length = decoder.sequences[1].length + decoder.widest_verify
    assert driver.mapped_bytes - at_first == decoder.growing_bytes(length) == decoder.held_bytes(1)
    assert decoder.held_bytes(0) == 0
    snapshots = [decoder.snapshot(1), decoder.snapshot(1, on_device=True)]
    addresses = {name: buffer.address for name, buffer in decoder.states.items()}
    expected = decoder.run([Read(1, [11])])[0].array[0].copy()
    decoder.release(1)
    assert driver.mapped_bytes == at_first
    for snapshot in snapshots:
        decoder.restore(snapshot, 2)
        np.testing.assert_array_equal(decoder.run([Read(2, [11])])[0].array[0], expected)
    assert {name: buffer.address for name, buffer in decoder.states.items()} == addresses


def test_memory_that_runs_out_ends_one_sequence(model: Model, driver: FakeDriver) -> None:
    decoder = model.decoder(3, drafts=True)
    decoder.prefill(range(30), 0)
    driver.memory = driver.used + decoder.growing_bytes(CONTEXT) // 2
    held = driver.mapped_bytes
    with pytest.raises(BundleError, match="too little free memory"):
        decoder.run([Read(1, range(CONTEXT - 10), logits=0)])
    driver.memory *= 2
    assert driver.mapped_bytes - held < decoder.growing_bytes(CONTEXT)
    assert decoder.sequences[1].settled
    decoder.release(1)
    assert driver.mapped_bytes == held
    assert np.isfinite(decoder.step([1, 2, 3])).all()


def test_an_engine_stays_below_its_limit(model: Model, driver: FakeDriver) -> None:
    """Pages of running sequences and beginnings of prompts on the device are counted; what waits is on the host."""
    decoder = model.decoder(4, drafts=True)
    states, pages = decoder.fixed_bytes, driver.mapped_bytes
    limit = states + decoder.growing_bytes(CONTEXT + decoder.widest_verify) + decoder.growing_bytes(70) + PREFIXES
    del decoder
    gc.collect()
    requests = [Request(list(range(5 + i, 45 + i)), Sampler(SamplingParams(greedy=True)), (), 90, 30) for i in range(4)]
    expected = [list(model.generate(request, Statistics())) for request in requests]
    most: list[int] = []

    def make() -> Decoder:
        decoder = model.decoder(4, drafts=True)
        decoder.observer = lambda *call: most.append(driver.mapped_bytes)
        return decoder

    with Engine(make, cache_memory=limit, prefix_memory=PREFIXES, prefix_on_device=True, drafts=2) as engine:
        own = driver.mapped_bytes - pages
        streams = [engine.submit(replace(request, cancelled=threading.Event())) for request in requests]
        assert [list(stream) for stream in streams] == expected
        assert engine.statistics.preemptions and engine.statistics.prefix.points
        assert engine.statistics.cache_limit == limit
        assert max(most) - own + states - pages <= limit
        assert driver.mapped_bytes == own + pages
