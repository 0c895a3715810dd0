"""`qwen-export run`: what may be required of an answer, and where its parts are printed."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_export.terminal.call_collector import CallCollector
from tests.support.command_line import caller

GREEDY = ("--greedy", "--max-new-tokens", "16")


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Any:
    """Run a command; returns exit code, stdout, stderr."""
    return caller(capfdbinary)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts a text into a pipe that is stdin."""
    read, write = os.pipe()

    def fill(text: str) -> None:
        os.write(write, text.encode())
        os.close(write)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(os.fdopen(read, "rb")))

    yield fill


def test_a_prompt_from_a_pipe_needs_no_name(run: Any, demo_bundle: Path, pipe: Any) -> None:
    expected = run("run", demo_bundle, "def add(a, b):", *GREEDY)
    pipe("def add(a, b):")
    assert run("run", demo_bundle, *GREEDY)[:2] == expected[:2]


def test_reasoning_is_not_part_of_piped_output(run: Any, demo_bundle: Path) -> None:
    code, out, err = run("run", demo_bundle, "Hello", "--thinking", *GREEDY)
    assert code == 0 and out == "" and "The user asks" in err
    assert run("run", demo_bundle, "Hello", "--thinking", *GREEDY, "--quiet")[1:] == ("", "")


def test_stop_texts_end_the_answer(run: Any, demo_bundle: Path) -> None:
    whole = run("run", demo_bundle, "def add(a, b):", *GREEDY)[1]
    assert "return" in whole
    cut = run("run", demo_bundle, "def add(a, b):", *GREEDY, "--stop", "no such", "--stop", "return")[1]
    assert cut.rstrip("\n") == whole[: whole.index("return")].rstrip("\n")
    kept = run("run", demo_bundle, "def add(a, b):", *GREEDY, "--stop", "return", "--include-stop")[1]
    assert kept == whole[: whole.index("return")] + "return\n"


def test_json_has_usage_and_log_probabilities(run: Any, demo_bundle: Path) -> None:
    code, out, _ = run("run", demo_bundle, "Hello", "--thinking", *GREEDY, "--json", "--logprobs", "2")
    result = json.loads(out)
    assert code == 0 and result["finish"] == "length" and result["tool_calls"] == []
    assert result["usage"]["completion_tokens"] == 16 == result["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert [token["id"] for token in result["logprobs"]] == result["tokens"]
    assert all(token["logprob"] <= 0 and len(token["top"]) == 2 for token in result["logprobs"])
    assert b"".join(bytes(token["bytes"]) for token in result["logprobs"]).decode().strip() == result["reasoning"]


def test_several_answers_with_seeds_of_their_own(run: Any, demo_bundle: Path) -> None:
    sampled = ("--max-new-tokens", "12", "--seed", "5", "--temperature", "1.5", "--json")
    _, out, _ = run("run", demo_bundle, "def add(a, b):", *sampled, "-n", "3")
    result = json.loads(out)
    texts = [answer["text"] for answer in result["answers"]]
    assert len(set(texts)) == 3 and result["usage"]["completion_tokens"] == sum(len(a["tokens"]) for a in result["answers"])
    _, out, _ = run("run", demo_bundle, "def add(a, b):", *sampled[:3], "6", *sampled[4:])
    assert json.loads(out)["text"] == texts[1]


def test_a_bias_forbids_a_token(run: Any, demo_bundle: Path) -> None:
    first = json.loads(run("run", demo_bundle, "def add(a, b):", *GREEDY, "--json")[1])["tokens"]
    biases = [f"--logit-bias={token}=-100" for token in set(first)]
    assert not set(json.loads(run("run", demo_bundle, "def add(a, b):", *GREEDY, "--json", *biases)[1])["tokens"]) & set(first)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--logit-bias", "x=1"), 2, "ID=BIAS"),
        (("--logit-bias", "1=nan"), 2, "finite"),
        (("--logit-bias", "1=101"), 1, "--logit-bias"),
        (("--logit-bias", "99999999=1"), 1, "vocabulary"),
        (("--logprobs", "1"), 2, "--json"),
        (("--tools", "no-such-file"), 1, "--tools"),
        (("--tools", "TEXT"), 1, "not JSON"),
        (("--tools", "OBJECT"), 1, "no list of functions"),
        (("--json-schema", "TEXT"), 1, "not JSON"),
        (("--json-object", "--regex", "a"), 2, "one of"),
        (("--frequency-penalty", "3"), 1, "--frequency-penalty"),
        (("-n", "0"), 2, "-n"),
    ],
)
def test_values_that_are_wrong(run: Any, tiny_bundle: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    files = {"TEXT": "no {json", "OBJECT": "{}"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    given = [tmp_path / a if a in files else a for a in arguments]
    got, out, err = run("run", tiny_bundle, "x", "--max-new-tokens", "1", *given)
    assert got == code and message in err and out == ""


TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"properties": {"city": {"enum": ["Ulm", "Rome"]}}, "required": ["city"]}},
    }
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"], "additionalProperties": False}


def test_an_answer_has_the_form_that_is_required(run: Any, demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "ab.lark").write_text('start: "a" | "b"')
    asked = ("run", demo_bundle, "Hi", "--no-thinking", "--greedy", "--max-new-tokens", "200")
    assert json.loads(run(*asked, "--json-schema", tmp_path / "schema.json")[1]).keys() == {"a"}
    assert re.fullmatch("[a-c]{3}", run(*asked, "--regex", "[a-c]{3}")[1].strip())
    assert run(*asked, "--choice", "left", "--choice", "right")[1].strip() in ("left", "right")
    assert run(*asked, "--grammar", tmp_path / "ab.lark")[1].strip() in ("a", "b")
    code, out, err = run(*asked, "--regex", "[")
    assert code == 1 and out == "" and "--regex" in err


def test_a_tool_that_must_be_called_is(run: Any, demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    asked = ("run", demo_bundle, "Hi", "--greedy", "--tools", tmp_path / "tools.json", "--tool-choice")
    code, out, _ = run(*asked, "required", "--no-thinking")
    assert code == 0 and json.loads(out)["name"] == "weather" and json.loads(out)["arguments"]["city"] in ("Ulm", "Rome")
    result = json.loads(run(*asked, "weather", "--thinking", "--thinking-budget", "4", "--json")[1])
    assert result["finish"] == "tool_calls" and result["tool_calls"][0]["name"] == "weather" and result["reasoning"]
    assert result["usage"]["completion_tokens_details"]["reasoning_tokens"] < result["usage"]["completion_tokens"]
    assert run(*asked, "another")[0] == 1


def test_tool_calls_are_collected_with_their_types() -> None:
    tool = {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}, "note": {"type": "string"}}}}
    text = (
        "Sure.\n\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=note>\nx\n</parameter>\n</function>\n</tool_call>"
    )
    calls = CallCollector([tool])
    shown = "".join(calls.push(text[i : i + 3]) for i in range(0, len(text), 3)) + calls.flush(True)
    assert shown.strip() == "Sure." and calls.calls == [{"name": "add", "arguments": {"a": 1, "note": "x"}}]
    cut = CallCollector([tool])
    cut.push(text[: text.index("</parameter>")])
    cut.flush(False)
    assert isinstance(cut.calls[0]["arguments"], str)


def test_a_tool_call_is_a_line_of_json(run: Any, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not trained for calls: its text is given."""
    from qwen_export.runtimes.model import Model

    class Answer:
        def __init__(self, real: Any, text: str) -> None:
            self.statistics, self.tokens, self.reasoning, self.content = real.statistics, [1], "", text
            self.statistics.finish = "stop"

        def events(self) -> Iterator[Any]:
            from qwen_export.runtimes.structured.answer_events import AnswerEvent

            yield AnswerEvent("answer", self.content)

    text = 'Look:\n<tool_call>\n{"name": "find", "arguments": {"what": "ü"}}\n</tool_call>'
    real = Model.stream
    monkeypatch.setattr(Model, "stream", lambda *a, **b: Answer(real(*a, **b), text))
    file = tmp_path / "tools.json"
    file.write_text(json.dumps({"tools": [{"type": "function", "function": {"name": "find", "parameters": {}}}]}))
    code, out, _ = run("run", demo_bundle, "x", "--tools", file, "--max-new-tokens", "4")
    assert code == 0 and out == 'Look:\n{"name": "find", "arguments": {"what": "ü"}}\n'
    result = json.loads(run("run", demo_bundle, "x", "--tools", file, "--json")[1])
    assert result["tool_calls"] == [{"name": "find", "arguments": {"what": "ü"}}] and result["finish"] == "tool_calls"
    assert result["text"] == "Look:"
