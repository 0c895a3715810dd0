"""Which of several devices: `load(device_id=1)` reaches the execution provider, every binding and every buffer.

The driver is a fake whose memory is that of the host, so the CPU's kernels can run a bundle as if it were on a GPU.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from qwen_export import build
from qwen_export.errors import BundleError, ParameterError
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.dynamic_decoder import DynamicDecoder
from qwen_export.runtimes.memory import cuda_driver
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer
from qwen_export.runtimes.memory.device import Device
from tests.support.cuda_sessions import cuda_sessions
from tests.support.fake_driver import FakeDriver


def test_a_model_on_the_second_gpu_touches_no_other(demo_bundle: Path, driver: FakeDriver) -> None:
    with cuda_sessions() as sessions:
        model = load(demo_bundle, device="cuda", device_id=1, threads=1, max_context=64)
        decoder = model.decoder(2, drafts=True)
        logits = decoder.prefill([5, 6, 7]).copy()
        decoder.step([8, 9])
        decoder.verify([1, 2, 3])
        decoder.accept(2)
        decoder.restore(decoder.snapshot(), 1)
        assert sessions.providers[0][1]["device_id"] == "1"
        assert sessions.bound - {("cpu", 0)} == {("cuda", 1)}, "some lengths may be read on the host"
    assert set(driver.owners.values()) == {driver.context_of(1)}
    np.testing.assert_allclose(logits, load(demo_bundle, threads=1).decoder().prefill([5, 6, 7]), atol=1e-4)


def test_stages_are_on_their_devices(demo_checkpoint: Path, tmp_path: Path, driver: FakeDriver) -> None:
    """States, caches and weights of a layer are where its stage is; what all stages read is everywhere."""
    bundle = build(demo_checkpoint, tmp_path / "stages", stages=2)
    prompt, answers = [5, 6, 7], []
    with cuda_sessions() as sessions:
        model = load(bundle, device="cuda", devices=[1, 0], threads=1, max_context=64)
        decoder = model.decoder(2, drafts=True)
        answers.append(decoder.prefill(prompt).copy())
        decoder.verify([1, 2, 3])
        decoder.accept(2)
        decoder.restore(decoder.snapshot(), 1)
        answers.append(np.array(decoder.step([8, 9])))
        assert sessions.bound - {("cpu", 0)} == {("cuda", 0), ("cuda", 1)}
        assert sessions.ran == {(index, driver.context_of(index)) for index in (0, 1)}
        assert isinstance(decoder, DynamicDecoder)
        layers = {name: buffer.index for name, buffer in decoder.states.items() if isinstance(buffer, CudaBuffer)}
    stage_of = {state.name: n for n in range(2) for state in load_manifest(bundle).graphs[f"decoder.{n}"].states}
    assert layers == {name: 1 - stage_of[name] for name in decoder.states}
    assert driver.connected == {(driver.context_of(0), driver.context_of(1))}
    alone = load(build(demo_checkpoint, tmp_path / "whole"), threads=1).decoder(2)
    np.testing.assert_allclose(answers[0], alone.prefill(prompt), atol=1e-4)


def test_buffers_stay_on_their_device(driver: FakeDriver) -> None:
    """Whatever device a thread, or a library in it, has used in between."""
    first, second = (Device("cuda", index).buffer("float", (4, 8)) for index in (0, 1))
    assert [driver.owners[buffer.address] for buffer in (first, second)] == [driver.context_of(0), driver.context_of(1)]
    values = np.arange(128, dtype=np.uint8)

    def work() -> None:
        cuda_driver.use_device(0)
        second.write(values)
        assert driver.context == driver.context_of(1)
        cuda_driver.use_device(0)
        np.testing.assert_array_equal(second.contents(), values)
        assert driver.context == driver.context_of(1)
        cuda_driver.use_device(0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    grown = second.grown(0, 9, 4)  # type: ignore[attr-defined]
    assert driver.owners[grown.address] == driver.context_of(1)
    np.testing.assert_array_equal(grown.read(0, 128), values)


def test_a_device_that_is_not_there_is_named(driver: FakeDriver) -> None:
    with pytest.raises(BundleError, match=r"no such GPU.*device 2.*0 to 1"):
        Device("cuda", 2).buffer("float", (1,))
    with pytest.raises(ParameterError, match="device_id"):
        Device("cuda", -1)
