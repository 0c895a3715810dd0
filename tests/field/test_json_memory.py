"""A small file of a checkpoint takes little memory, whatever size is allowed."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from qwen_export.errors import CheckpointError
from qwen_export.graphs.json_file import read_json_object


def test_reading_a_small_file_allocates_little(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    tracemalloc.start()
    assert read_json_object(path, "configuration") == {"a": 1}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1234567}')
    assert read_json_object(path, "configuration", largest=14) == {"a": 1234567}
    with pytest.raises(CheckpointError, match="too large"):
        read_json_object(path, "configuration", largest=13)
