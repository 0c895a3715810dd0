"""Memory of a device that runs engines, and the kernels that are compiled on it."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from qwen_export.manifest import WeightSpec, load_manifest
from qwen_export.runtimes import load
from qwen_export.runtimes.backends.tensorrt import tensorrt_engines
from qwen_export.runtimes.backends.tensorrt.kernel_cache import VARIABLE, KernelFile
from qwen_export.runtimes.memory.buffers import as_bytes
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer
from qwen_export.runtimes.memory.cuda_stream import Stream
from qwen_export.runtimes.memory.device_weights import arrange
from qwen_export.runtimes.memory.mapped_weights import weight_bytes
from qwen_export.runtimes.memory.stream_buffer import StreamBuffer
from tests.support.engine_machine import PROMPT, Machine
from tests.support.fake_tensorrt import engine_bundle
from tests.support.greedy import greedy


def test_weights_lie_on_the_device_once(bundle: Path, machine: Machine) -> None:
    driver, _ = machine()
    manifest = load_manifest(bundle)
    weights = {(w.file, w.offset): weight_bytes(w) for graph in manifest.graphs.values() for w in graph.weights}
    model = load(bundle)
    assert sum(weights.values()) <= sum(driver.allocated.values()) <= sum(weights.values()) + 256 * len(weights)
    assert model is not None


def test_weights_are_placed_at_multiples_of_256_and_shared() -> None:
    def weight(name: str, offset: int, size: int) -> WeightSpec:
        return WeightSpec(name, "model.weights", "uint8", (size,), offset)

    weights = [weight("a", 64, 100), weight("b", 0, 60), weight("again", 64, 100), weight("c", 300, 256)]
    sizes = {(w.file, w.offset): weight_bytes(w) for w in weights}
    offsets, size = arrange(weights, sizes)
    assert offsets == {("model.weights", 0): 0, ("model.weights", 64): 256, ("model.weights", 300): 512}
    assert size == 768
    assert arrange(weights, sizes, placed=offsets) == ({}, 0)


@pytest.mark.parametrize(("dtype", "expected"), [("int4", 8), ("float8e4m3fn", 15), ("float16", 30), ("float4e2m1", 8)])
def test_bytes_of_narrow_weights(dtype: str, expected: int) -> None:
    assert weight_bytes(WeightSpec("w", "f", dtype, (3, 5), 0)) == expected


def test_unloading_gives_everything_back_in_order(bundle: Path, machine: Machine) -> None:
    driver, tensorrt = machine()
    model = load(bundle)
    decoder = model.decoder()
    greedy(decoder, PROMPT, 6)
    assert driver.allocated and driver.pinned and driver.recordings and tensorrt.live["context"] > 2
    del model, decoder
    gc.collect()
    assert not driver.allocated and not driver.pinned and not driver.recordings and not driver.streams
    assert set(tensorrt.live.values()) == {0}
    assert tensorrt.order[-1] == "runtime"


def test_at_the_end_of_the_process_engines_go_before_the_library(bundle: Path, machine: Machine) -> None:
    driver, tensorrt = machine()
    model = load(bundle)
    decoder = model.decoder()
    greedy(decoder, PROMPT, 6)
    tensorrt_engines.release_engines()
    assert tensorrt.live == {"runtime": 1, "engine": 0, "context": 0} and not driver.recordings
    assert decoder.lengths == [len(PROMPT) + 6]


def test_two_bundles_in_one_process(portable: Path, bundle: Path, tmp_path: Path, machine: Machine) -> None:
    driver, tensorrt = machine()
    second = engine_bundle(portable, tmp_path / "second")
    models = [load(bundle), load(second)]
    decoders = [model.decoder() for model in models]
    rows = [decoder.prefill(PROMPT).copy() for decoder in decoders]
    for token in (1, 2, 3):
        rows = [decoder.step([token])[0].copy() for decoder in decoders]
        np.testing.assert_array_equal(rows[0], rows[1])
    before = sum(driver.allocated.values())
    del models[0], decoders[0]
    gc.collect()
    assert sum(driver.allocated.values()) < before and tensorrt.live["runtime"] == 1
    assert np.isfinite(decoders[0].step([4])).all()


def test_small_buffers_wait_for_nobody_and_never_mix_up(machine: Machine) -> None:
    machine()
    stream = Stream()
    buffer = StreamBuffer("int32", (4,), stream)
    assert buffer.array().tolist() == [0, 0, 0, 0]
    waits = stream.waits
    buffer.write(as_bytes(np.arange(4, dtype=np.int32)))
    assert stream.waits == waits
    buffer.write(as_bytes(np.array([9], np.int32)), 4)
    assert stream.waits == waits + 1  # the first copy may still be reading what the second one writes
    assert buffer.array().tolist() == [0, 9, 2, 3]
    assert buffer.read(4, 4).view(np.int32).tolist() == [9]


def test_large_buffers_keep_their_contents(machine: Machine) -> None:
    machine()
    stream = Stream()
    one, two = (StreamBuffer("float", (40_000,), stream) for _ in range(2))
    values = np.arange(40_000, dtype=np.float32)
    one.write(as_bytes(values))
    two.copy_from(one, 0, 4, one.nbytes - 4)
    np.testing.assert_array_equal(two.array(), np.append(values[1:], np.float32(0)))
    two.write(as_bytes(np.float32(7)), 0)
    assert two.array()[0] == 7


def test_buffers_of_onnx_runtime_use_the_same_driver(machine: Machine) -> None:
    driver, _ = machine()
    cache = CudaBuffer("float16", (1, 2, 3, 4))
    cache.write(as_bytes(np.arange(24, dtype=np.float16)))
    larger = cache.grown(2, 5, 2)
    rows = larger.array()
    assert rows.shape == (1, 2, 5, 4) and rows[0, 1, 1].tolist() == [16, 17, 18, 19] and not rows[0, :, 2:].any()
    del cache, larger
    assert not driver.allocated and not driver.pinned


# Kernels compiled on the machine


def test_a_second_start_compiles_nothing(bundle: Path, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "kernels"))
    _, first = machine()
    greedy(load(bundle).decoder(), PROMPT, 2)
    _, second = machine()
    greedy(load(bundle).decoder(), PROMPT, 2)
    assert first.compiled == 2 and second.compiled == 0
    assert len(list((tmp_path / "kernels").iterdir())) == 2


def test_kernels_belong_to_one_engine_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    KernelFile("engine", ("1.5", "GPU")).write(b"kernels")
    assert KernelFile("engine", ("1.5", "GPU")).read() == b"kernels"
    assert KernelFile("engine", ("1.5", "other")).read() == b"" == KernelFile("another", ("1.5", "GPU")).read()
    monkeypatch.setenv(VARIABLE, "")
    nowhere = KernelFile("engine", ("1.5", "GPU"))
    nowhere.write(b"kernels")
    assert nowhere.read() == b""


def test_prepared_calls_leave_no_trace(portable: Path, bundle: Path, machine: Machine) -> None:
    """Whatever the controls and states hold when a call is prepared, the run that follows leaves the same."""
    driver, _ = machine()
    plain, prepared = (load(bundle).decoder() for _ in range(2))
    for decoder in (plain, prepared):
        decoder.prefill(PROMPT)
    for token in (5, 6, 7, 8):
        expected = plain.step([token])
        prepared.prepare(1)
        launched = driver.launches
        np.testing.assert_array_equal(expected, prepared.step([token]))
        assert driver.launches == launched + 1, "it is recorded"


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_preparing_changes_nothing(bundle: Path, machine: Machine, steps: int) -> None:
    """Between any two calls, with drafts open and without; and afterwards both calls of the graph are recorded."""
    driver, _ = machine()
    plain, prepared = (load(bundle).decoder() for _ in range(2))
    widest = prepared.widest_verify
    for decoder in (plain, prepared):
        decoder.prefill(PROMPT)
        for token in range(3, 3 + steps):
            decoder.step([token])
        decoder.verify([7, 8, 9][:widest])
        decoder.accept(2)
    prepared.prepare(widest)
    prepared.prepare(1)
    for token in (5, 6, 7):
        np.testing.assert_array_equal(plain.step([token]), prepared.step([token]))
        prepared.warm()
        expected, launched = plain.verify([token, 4]), driver.launches
        np.testing.assert_array_equal(expected, prepared.verify([token, 4]))
        assert driver.launches == launched + 1, "it is recorded"
        for decoder in (plain, prepared):
            decoder.accept(1)


def test_a_warm_decoder_prepares_nothing_more(bundle: Path, machine: Machine) -> None:
    machine()
    decoder = load(bundle, speculate="off").decoder()
    decoder.warm()
    before = decoder.binding_s
    decoder.prefill(PROMPT)
    for token in (4, 5, 6):
        decoder.step([token])
    assert decoder.binding_s == before > 0
