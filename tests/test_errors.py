"""Every error that the packages raise, read from the sources: its five parts, its style, and the names in it."""

from __future__ import annotations

import ast
import builtins
import inspect
import pickle
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click
import pytest

from qwen_export.building.compiler import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.bundles.packaging import package
from qwen_export.bundles.packaging_windows import package_windows
from qwen_export.bundles.signatures import check_signature, sign_bundle
from qwen_export.commands.cli import COMMANDS, group
from qwen_export.commands.flags import flag
from qwen_export.engine_options import EngineOptions
from qwen_export.errors import ParameterError, QwenExportError
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.benchmark import benchmark
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.draft_head import DraftHead
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.server.http_server import listening_socket
from qwen_export.runtimes.server.inherited_socket import inherited_socket
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.serving.engine_group import EngineGroup
from qwen_export.runtimes.structured.answer_options import AnswerOptions
from qwen_export.runtimes.text.chat_prompt import chat_prompt
from qwen_export.runtimes.vision.chat_media import MediaOptions
from qwen_export.runtimes.vision.picture_source import MediaAccess
from qwen_export.verification.layer_check import verify_layers
from qwen_export.verification.logit_check import verify
from tests.support.raises import FLAG, PARAMETER, Made, errors_made
from tests.support.source_tree import ROOT, TREES, parsed, sources

# Folders whose errors are checked one by one, so that a failure names its room.
ROOMS = sorted({str(path.parent.relative_to(ROOT)) for path in sources(*TREES)})

# What a library must not print: the command line puts flags in the place of parameters' names.
WITHOUT_FLAGS = [room for room in ROOMS if room.split("/")[0] != "qwen_export"]

# Exceptions of Python itself. Those of the first kind are for mistakes in the code that calls, or belong to a protocol; a ValueError
# is a reason that the same package catches and puts into an error of ours, or a precondition of an op, which only a test breaks.
ANYWHERE = {
    "AssertionError",
    "TypeError",
    "NotImplementedError",
    "AttributeError",
    "KeyboardInterrupt",
    "StopIteration",
    "StopAsyncIteration",
}
REASONS = {
    "manifest": {"ValueError"},
    "manifest_checks": {"ValueError"},
    "manifest_graph_checks": {"ValueError"},
    "manifest_parsing": {"ValueError"},
    "manifest_vision_checks": {"ValueError"},
    "safetensors_header": {"ValueError"},
    "generation_config": {"ValueError"},
    "tool_values": {"ValueError"},
    "gated_attention_op": {"ValueError"},
    "gated_delta_net_op": {"ValueError"},
    "expression": {"ValueError", "RuntimeError"},
    "packing": {"ValueError"},
    "native_search": {"ValueError"},
    "lower_graphs": {"ValueError"},
}

# Fields of options whose flag has a longer name (EngineOptions.weights is --engine-weights), and of requests in a batch file.
ALSO = {"engine_weights", "max_tokens", "chat_template_kwargs", "echo"}

# Parameters of functions beside `build`, `load`, the model and the decoder.
CALLS = (
    verify,
    verify_layers,
    benchmark,
    package,
    package_windows,
    check_signature,
    sign_bundle,
    listening_socket,
    chat_prompt,
    inherited_socket,
)


def made(room: str) -> list[Made]:
    return [error for path in sorted((ROOT / room).glob("*.py")) for error in errors_made(path)]


def public_parameters() -> set[str]:
    """Names of parameters of the Python API, and of the fields of its options."""
    calls: tuple[Callable[..., Any], ...] = (build, load, Engine.__init__, Engine.of, EngineGroup.of, *CALLS)
    for kind in (Model, Decoder, DraftHead, Engine):
        calls += tuple(value for name, value in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_"))
    options = (StaticOptions, EngineOptions, SamplingParams, AnswerOptions, Read, MediaOptions, MediaAccess)
    names = ALSO | {name for call in calls for name in inspect.signature(call).parameters}
    return names | {field.name for option in options for field in fields(option)}


def command_parameters() -> set[str]:
    """Those of the commands: some have no counterpart in the API."""
    commands = (group.get_command(click.Context(group), name) for name in COMMANDS)
    return {parameter.name for command in commands if command for parameter in command.params if parameter.name}


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
    fixes = [(error, fix) for error in made(room) for fix in error.parts.get("fix", ()) if fix]
    assert not [f"{error}: {fix}" for error, fix in fixes if fix[0].islower() or fix[-1] not in ".?…"]


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
    known = public_parameters() | (command_parameters() if room.startswith("qwen_export") else set())
    wrong = []
    for error in made(room):
        named = [match for part in ("what", "fix") for text in error.parts.get(part, ()) for match in PARAMETER.findall(text)]
        named += [text for text in error.parts.get("parameter", ()) if "…" not in text]
        wrong += [f"{error}: {name}" for name in named if name not in known]
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_exceptions_of_python_are_not_for_users(room: str) -> None:
    wrong = []
    for path in sorted((ROOT / room).glob("*.py")):
        for node in ast.walk(parsed(path)):
            call = node.exc if isinstance(node, ast.Raise) else None
            kind = ast.unparse(call.func if isinstance(call, ast.Call) else call) if call else ""
            if hasattr(builtins, kind) and kind not in ANYWHERE | REASONS.get(path.stem, set()):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {kind}")
    assert not wrong


def test_the_list_of_reasons_is_no_longer_than_needed() -> None:
    files = {path.stem: path for path in sources(*TREES)}
    unused = [stem for stem, kinds in REASONS.items() if not all(f"raise {kind}" in files[stem].read_text("utf-8") for kind in kinds)]
    assert not unused


# The error itself


def test_a_message_has_its_parts_in_one_line() -> None:
    error = QwenExportError("what failed", where="a file", got="one\nline", expected=2, fix="Change {max_context}.")
    assert str(error) == "what failed (a file): got one line, expected 2. Change max_context."
    assert error.text(flag) == "what failed (a file): got one line, expected 2. Change --max-context."


def test_an_error_of_a_parameter_names_it_once() -> None:
    assert str(ParameterError("the value is negative", parameter="seed", got=-1)).startswith("seed: the value is negative: got -1")
    assert str(ParameterError("{seed} is negative", parameter="seed")) == "seed is negative."
    assert ParameterError("{seed} is negative", parameter="seed").text(flag) == "--seed is negative."
    assert isinstance(ParameterError("", parameter="seed"), ValueError)


def test_errors_can_be_sent_to_another_process() -> None:
    error = ParameterError("the value is negative", parameter="seed", where="here", got=-1, expected="at least 0", fix="Raise {seed}.")
    restored = pickle.loads(pickle.dumps(error))
    assert type(restored) is ParameterError and str(restored) == str(error) and restored.parameter == "seed"
