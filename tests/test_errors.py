"""Every error that the packages raise, read from the sources: its five parts, its style, and the names in it."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from qwen_export.building.compiler import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.engine_options import EngineOptions
from qwen_export.errors import ParameterError, QwenExportError
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.read import Read
from tests.support.raises import FLAG, PARAMETER, errors_made
from tests.support.source_tree import ROOT, TREES, parsed, sources

# Folders whose errors are checked one by one, so that a failure names its room.
ROOMS = sorted({str(path.parent.relative_to(ROOT)) for path in sources(*TREES)})

# What a library must not print: the command line puts flags in the place of parameters' names.
WITHOUT_FLAGS = [room for room in ROOMS if room.split("/")[0] != "qwen_export"]

# Raises of programming errors and of protocols of Python. Everything else that a package raises has five parts.
OTHER_ERRORS = {"AssertionError", "TypeError", "NotImplementedError", "AttributeError", "KeyError", "StopIteration", "SystemExit"}


def made(room: str) -> list[Any]:
    return [error for path in sorted((ROOT / room).glob("*.py")) for error in errors_made(path)]


def public_parameters() -> set[str]:
    """Names of parameters of the Python API, and of the fields of its options."""
    calls: tuple[Callable[..., Any], ...] = (build, load, Decoder.run, Decoder.prefill)
    calls += tuple(value for name, value in vars(Model).items() if not name.startswith("_") and callable(value))
    options = (StaticOptions, EngineOptions, SamplingParams, Read)
    names = {name for call in calls for name in inspect.signature(call).parameters}
    return names | {field.name for option in options for field in fields(option)}


@pytest.mark.parametrize("room", ROOMS)
def test_every_error_has_a_fix(room: str) -> None:
    wrong = [str(error) for error in made(room) if not any(error.parts.get("fix", ()))]
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_messages_begin_in_lower_case_and_have_no_full_stop(room: str) -> None:
    wrong = []
    for error in made(room):
        for what in error.parts.get("what", ()):
            # A name in capitals may stand first: CUDA, JSON, YaRN.
            capital = re.match(r"[A-Z][a-z]+\b", what) and not re.match(r"(Python|Windows|Flash|Linux)\b", what)
            if not what or capital or what.endswith("."):
                wrong.append(f"{error}: {what}")
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_a_fix_is_made_of_whole_sentences(room: str) -> None:
    wrong = []
    for error in made(room):
        for fix in error.parts.get("fix", ()):
            if fix and (fix[0].islower() or fix[-1] not in ".?…"):
                wrong.append(f"{error}: {fix}")
    assert not wrong


@pytest.mark.parametrize("room", WITHOUT_FLAGS)
def test_messages_name_parameters_not_flags(room: str) -> None:
    """A text may quote a command, `qwen-export package BUNDLE --output DIR`, or another program's."""
    wrong = []
    for error in made(room):
        for texts in error.parts.values():
            for text in texts:
                without_commands = re.sub(r"`[^`]*`|(qwen-export|pip|nvidia-smi|make|git) [^.,;:]*", "", text)
                if FLAG.search(without_commands):
                    wrong.append(f"{error}: {text}")
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_names_in_braces_are_parameters_of_the_api(room: str) -> None:
    known = public_parameters()
    wrong = []
    for error in made(room):
        named = [match for part in ("what", "fix") for text in error.parts.get(part, ()) for match in PARAMETER.findall(text)]
        named += [text for text in error.parts.get("parameter", ()) if "…" not in text]
        wrong += [f"{error}: {name}" for name in named if name not in known]
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_only_errors_with_five_parts_are_raised(room: str) -> None:
    wrong = []
    for path in sorted((ROOT / room).glob("*.py")):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                kind = node.exc.func.id
                if isinstance(getattr(__builtins__ if not isinstance(__builtins__, dict) else None, kind, None), type):
                    wrong.append(kind)
    assert not wrong
