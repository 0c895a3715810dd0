"""Caches that grow for each sequence alone, on a real GPU: pages come and go, results and recordings stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen_export.runtimes import Model
from qwen_export.runtimes.memory.cuda_driver import memory_info
from qwen_export.runtimes.memory.growing_buffer import GrowingBuffer
from tests.support.longer_context import on_gpu

pytestmark = pytest.mark.gpu
CONTEXT = 40_000


@pytest.fixture(scope="module")
def model(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with on_gpu(demo_checkpoint, CONTEXT, tmp_path_factory.mktemp("growing")) as model:
        yield model


def alone(model: Model) -> Model:
    """As if attention cost by the tokens read: true of this project's op, and right, if slow, with ONNX Runtime's."""
    model.manifest = replace(model.manifest, target=replace(model.manifest.target, operators=()))
    return model


def test_memory_is_the_devices() -> None:
    gc.collect()
    free = memory_info()[0]
    buffer = GrowingBuffer("float16", (64, 2, 1 << 18, 256))
    assert free - memory_info()[0] < 8 << 20
    buffer.hold(3, buffer.step + 1)
    assert free - memory_info()[0] >= buffer.bytes_for(buffer.step + 1)
    start = 3 * buffer.row_bytes
    buffer.write(np.arange(1 << 16, dtype=np.uint8), start + buffer.step * 512 - 1024)
    np.testing.assert_array_equal(buffer.read(start + buffer.step * 512 - 1024, 1 << 16), np.arange(1 << 16, dtype=np.uint8))
    buffer.hold(3, 0)
    del buffer
    gc.collect()
    assert free - memory_info()[0] < 8 << 20


def test_results_are_those_of_caches_that_double(model: Model) -> None:
    """Prompts and recorded steps across the ends of pages, snapshots through the host and on the device."""
    doubled = model.decoder(3, drafts=True)
    growing = alone(model).decoder(3, drafts=True)
    ids = np.random.default_rng(0).integers(0, 200, CONTEXT // 2 + 2000).tolist()
    held = growing.held_bytes(1)
    for decoder in (doubled, growing):
        decoder.step([1, 2, 3])
    for got, expected in zip(*([decoder.prefill(ids, 1).copy() for _ in range(1)] for decoder in (growing, doubled)), strict=True):
        np.testing.assert_allclose(got, expected, atol=0.05)
    assert growing.held_bytes(1) > held == growing.held_bytes(0)
    for token in range(8):
        got, expected = (decoder.step([token, token + 1, token + 2]).copy() for decoder in (growing, doubled))
        np.testing.assert_allclose(got, expected, atol=0.05)
    wanted = growing.step([5, 6, 7])[1].copy()
    growing.rewind(growing.mark(1), 1)
    for on_device in (False, True):
        snapshot = growing.snapshot(1, on_device=on_device)
        expected = growing.step([5, 6, 7])[1].copy()
        growing.restore(snapshot, 2)
        growing.restore(snapshot, 1)
        rows = growing.step([5, 6, 6])
        np.testing.assert_array_equal(rows[1], expected)
        assert np.abs(rows[2].array - rows[1].array).max() < 0.05
    growing.release(2)
    assert growing.held_bytes(2) == held
    assert np.isfinite(wanted).all()
