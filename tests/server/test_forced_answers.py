"""What a request forces comes out, whatever the model would have said: forms, calls, budgets; in every protocol."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.support.live_server import LiveServer

pytest.importorskip("llguidance")

HI: list[Any] = [{"role": "user", "content": "Choose a city."}]
OFF = {"enable_thinking": False}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}, "ok": {"type": "boolean"}, "count": {"type": "integer"}},
    "required": ["city", "ok", "count"],
    "additionalProperties": False,
}
SET_CITY = {"type": "function", "function": {"name": "set_city", "parameters": SCHEMA}}
NOOP = {"type": "function", "function": {"name": "noop", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "set_city"}}


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def claude(server: LiveServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def chat(client: openai.OpenAI, **more: Any) -> Any:
    given: dict[str, Any] = {"model": "demo", "messages": HI, "max_tokens": 300, "extra_body": OFF, **more}
    return client.chat.completions.create(**given)


def check_city(value: Any) -> None:
    assert set(value) == {"city", "ok", "count"} and value["city"] in ("Oslo", "Rome")
    assert isinstance(value["ok"], bool) and isinstance(value["count"], int) and abs(value["count"]) < 1 << 53


@pytest.mark.parametrize("thinking", [False, True])
def test_a_schema(client: openai.OpenAI, thinking: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
    made = chat(client, response_format=form, extra_body={"enable_thinking": thinking})
    assert made.choices[0].finish_reason == "stop"
    check_city(json.loads(made.choices[0].message.content))
    text = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in chat(client, response_format=form, extra_body={"enable_thinking": thinking}, stream=True)
    )
    check_city(json.loads(text))


def test_a_model_of_pydantic(client: openai.OpenAI) -> None:
    class Answer(BaseModel):
        ok: bool

    made = client.chat.completions.parse(model="demo", messages=HI, response_format=Answer, max_tokens=200, extra_body=OFF)
    assert isinstance(made.choices[0].message.parsed, Answer)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "x" | "y"'}, "x|y"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_other_forms(server: LiveServer, form: dict[str, Any], pattern: str, path: str) -> None:
    body = {"messages": HI, "prompt": "Choose.", "max_tokens": 60, "structured_outputs": form, **OFF}
    [choice] = httpx.post(f"{server.url}{path}", json=body, timeout=60).json()["choices"]
    assert re.fullmatch(pattern, choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize("stream", [False, True])
def test_forms_that_cannot_be_compiled(client: openai.OpenAI, stream: bool) -> None:
    """Refused before the first byte."""
    for form in ({"type": "no-such-type"}, {"type": "object", "properties": {"a": {"$ref": "http://example.org/x.json"}}}):
        with pytest.raises(openai.BadRequestError):
            chat(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": form}}, stream=stream)
    with pytest.raises(openai.BadRequestError):
        chat(client, extra_body={"structured_outputs": {"regex": "(unclosed"}}, stream=stream)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_must_come(client: openai.OpenAI, choice: Any, thinking: bool) -> None:
    made = chat(client, tools=[SET_CITY, NOOP], tool_choice=choice, extra_body={"enable_thinking": thinking})
    [first, *_] = made.choices[0].message.tool_calls
    assert made.choices[0].finish_reason == "tool_calls" and first.function.name in ("set_city", "noop")
    if choice is NAMED:
        assert first.function.name == "set_city"
        check_city(json.loads(first.function.arguments))


def test_one_call_at_most(client: openai.OpenAI) -> None:
    for seed in range(5):
        made = chat(client, tools=[SET_CITY, NOOP], tool_choice="required", parallel_tool_calls=False, seed=seed)
        assert len(made.choices[0].message.tool_calls) == 1


def test_no_call_may_come(client: openai.OpenAI) -> None:
    made = chat(client, tools=[SET_CITY, NOOP], tool_choice="none", max_tokens=40).choices[0]
    assert made.message.tool_calls is None and made.finish_reason in ("stop", "length")


@pytest.mark.parametrize("budget", [0, 1, 12])
def test_a_budget_of_thinking(client: openai.OpenAI, budget: int) -> None:
    made = chat(client, extra_body={"enable_thinking": True, "thinking_budget": budget}, max_tokens=60, temperature=0)
    assert made.usage.completion_tokens_details.reasoning_tokens <= budget + 4 and "</think>" not in (made.choices[0].message.content or "")


def test_forced_in_messages(claude: anthropic.Anthropic) -> None:
    tools: Any = [{"name": "set_city", "input_schema": SCHEMA}]
    given: Any = {"model": "demo", "max_tokens": 300, "messages": HI, "tools": tools}
    for choice in ({"type": "any"}, {"type": "tool", "name": "set_city"}):
        made = claude.messages.create(**given, tool_choice=choice)
        [call, *_] = [block for block in made.content if block.type == "tool_use"]
        check_city(call.input)
        assert made.stop_reason == "tool_use" and call.id.startswith("toolu_")
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "done"} for block in made.content if block.type == "tool_use"
        ]
        turns = [*HI, {"role": "assistant", "content": made.content}, {"role": "user", "content": results}]
        assert claude.messages.create(**{**given, "messages": turns, "max_tokens": 4}).usage.output_tokens > 0
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    check_city(
        json.loads(claude.messages.create(model="demo", max_tokens=300, messages=HI, extra_body={"output_config": form}).content[0].text)
    )


@pytest.mark.parametrize("stream", [False, True])
def test_forced_in_responses(client: openai.OpenAI, stream: bool) -> None:
    tools: Any = [{"type": "function", "strict": True, **SET_CITY["function"]}, {"type": "web_search"}]  # type: ignore[dict-item]
    given: Any = {"model": "demo", "input": "Choose.", "tools": tools, "tool_choice": "required", "max_output_tokens": 300}
    made = client.responses.create(**given, stream=stream)
    made = list(made)[-1].response if stream else made
    call = next(item for item in made.output if item.type == "function_call")
    check_city(json.loads(call.arguments))
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    check_city(json.loads(client.responses.create(model="demo", input="Choose.", text=form, max_output_tokens=300).output_text))
