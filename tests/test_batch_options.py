"""Lines of a batch file that require something of their answers: forms, tools, log probabilities, several answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_export.runtimes import Model, load
from qwen_export.runtimes.serving.batch_run import run_batch
from qwen_export.runtimes.serving.engine import Engine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def served(demo_bundle: Path) -> Iterator[tuple[Model, Engine]]:
    model = load(demo_bundle, threads=1, max_context=256, speculate="off")
    with Engine.of(model, 4) as engine:
        yield model, engine


@pytest.fixture
def ask(served: tuple[Model, Engine], tmp_path: Path) -> Any:
    def asked(*bodies: dict[str, Any]) -> list[dict[str, Any]]:
        """The bodies of the answers, one per request."""
        lines = [{"custom_id": str(i), "url": TEXT if "prompt" in body else CHAT, "body": body} for i, body in enumerate(bodies)]
        requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
        requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
        run_batch(*served, requests, answers, 4)
        return [json.loads(line)["response"]["body"] for line in answers.read_text().splitlines()]

    return asked


def chat(**body: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 60, "seed": 1, "enable_thinking": False, **body}


def test_forms(ask: Any) -> None:
    forms = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"regex": "[ab]{2}"}},
        {"response_format": {"type": "text"}},
    ]
    texts = [body["choices"][0]["message"]["content"] for body in ask(*(chat(**form) for form in forms))]
    assert json.loads(texts[0])["n"] in (1, 2)
    assert texts[1] in ("yes", "no") and set(texts[2]) <= {"a", "b"} and texts[3]


def test_tools(ask: Any) -> None:
    named = {"type": "function", "function": {"name": "now"}}
    bodies = ask(*(chat(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False) for choice in ("required", named, "none")))
    for body in bodies[:2]:
        [choice] = body["choices"]
        [call] = choice["message"]["tool_calls"]
        assert (call["function"], choice["finish_reason"]) == ({"name": "now", "arguments": "{}"}, "tool_calls")
    assert "tool_calls" not in bodies[2]["choices"][0]["message"]


def test_log_probabilities(ask: Any) -> None:
    asked = {"prompt": "def f(size):\n", "max_tokens": 4, "temperature": 0, "logprobs": 1}
    first, second, third = ask(
        chat(logprobs=True, top_logprobs=2, max_tokens=3), {**asked, "echo": True}, {**asked, "echo": True, "max_tokens": 0}
    )
    content = first["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == first["choices"][0]["message"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    for body, new in ((second, 4), (third, 0)):
        [choice] = body["choices"]
        found = choice["logprobs"]
        assert body["usage"]["completion_tokens"] == new
        assert "".join(found["tokens"]) == choice["text"]
        assert found["token_logprobs"][0] is None and max(found["token_logprobs"][1:]) < 0
        assert len(found["tokens"]) == len(found["top_logprobs"]) == len(found["text_offset"]) == body["usage"]["total_tokens"]
        assert all(choice["text"][at:].startswith(token) for at, token in zip(found["text_offset"], found["tokens"], strict=True))


def test_several_answers_and_ends(ask: Any, served: tuple[Model, Engine]) -> None:
    three, biased, stopped = ask(
        chat(n=3, max_tokens=5),
        chat(logit_bias={"1234": 100}, max_tokens=2),
        chat(min_tokens=9, max_tokens=9, stop=["e"], include_stop_str_in_output=True, stop_token_ids=[0]),
    )
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in three["choices"]}) == 3
    assert three["usage"]["completion_tokens"] == 15
    assert biased["choices"][0]["message"]["content"] == served[0].tokenizer.decode([1234, 1234])
    assert stopped["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"n": 0}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "form"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_what_is_not_usable_is_refused(ask: Any, body: dict[str, Any], field: str) -> None:
    [answer] = ask(chat(**body))
    assert answer["error"]["param"] == field
