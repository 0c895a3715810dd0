"""A GPU and TensorRT that are not there: a fake driver and a fake library run the graphs of a bundle with ONNX Runtime."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qwen_export.runtimes.backends.tensorrt import tensorrt_compatibility, tensorrt_engines
from qwen_export.runtimes.memory import cuda_driver
from tests.support.fake_driver import FakeDriver
from tests.support.fake_tensorrt import FakeTensorRT

CAPACITY, CHUNK, WIDTH = 96, 16, 4
"""Context, tokens of a prompt call and tokens of a step, of the bundle that the tests share."""
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19, 71]

Machine = Callable[..., tuple[FakeDriver, FakeTensorRT]]
"""Installs a GPU: arguments of FakeDriver, and `library` with those of FakeTensorRT."""


@contextmanager
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    def install(library: dict[str, Any] | None = None, **options: Any) -> tuple[FakeDriver, FakeTensorRT]:
        gc.collect()
        cuda_driver.forget_driver()
        driver = FakeDriver(**options)
        tensorrt = FakeTensorRT(driver, **(library or {}))
        monkeypatch.setattr(cuda_driver, "load_driver", lambda: driver)
        for module in (tensorrt_engines, tensorrt_compatibility):
            monkeypatch.setattr(module, "load_library", lambda flavour: tensorrt.library())
        return driver, tensorrt

    yield install
    gc.collect()
    cuda_driver.forget_driver()
