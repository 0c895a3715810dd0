"""Engines on a machine without a GPU: a fake driver and a fake TensorRT that run the graphs with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from tests.support.engine_machine import CAPACITY, CHUNK, WIDTH, Machine, machines
from tests.support.fake_tensorrt import engine_bundle
from tests.support.synthesize import synthesize
from tests.test_parity import tiny


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs that the engines stand for, in a bundle that ONNX Runtime runs."""
    directory = tmp_path_factory.mktemp("portable")
    checkpoint = synthesize(tiny(value_ratio=2, query_ratio=4, tied=True, vision=False), directory / "checkpoint")
    options = StaticOptions(CHUNK, step_tokens=WIDTH)
    return build(checkpoint, directory / "bundle", target="onnx", max_context=CAPACITY, options=options)


@pytest.fixture
def bundle(portable: Path, tmp_path: Path) -> Path:
    return engine_bundle(portable, tmp_path / "engines")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with machines(monkeypatch) as install:
        yield install
