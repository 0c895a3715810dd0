"""An answer is the same in every protocol, whole and streamed: what it thinks, what it says, what it calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.support.scripted_engine import ScriptedEngine, scripted_engine

DATA = json.loads((Path(__file__).parents[1] / "data" / "tool_calls.json").read_text(encoding="utf-8"))
TOOLS: list[Any] = [tool if "function" in tool else {"type": "function", "function": tool} for tool in DATA["tools"]]
USER: list[Any] = [{"role": "user", "content": "Do it."}]
PIECES = 6
"""Tokens that a step gives at most."""


@pytest.fixture(scope="module")
def scripted(demo_bundle: Path) -> Iterator[ScriptedEngine]:
    with scripted_engine(demo_bundle) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(scripted: ScriptedEngine) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def claude(scripted: ScriptedEngine) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=scripted.url, api_key="none", max_retries=0, timeout=60)


Answer = tuple[str, str, list[tuple[str, str]], str]
"""Reasoning, content, calls with the text of their arguments, the end."""


def chat(client: openai.OpenAI, tools: Any, thinking: bool) -> Answer:
    made = client.chat.completions.create(model="demo", messages=USER, tools=tools, extra_body={"enable_thinking": thinking})
    [choice] = made.choices
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    assert (choice.message.content is None) == bool(calls and not choice.message.content)
    extra = choice.message.model_extra or {}
    assert extra.get("reasoning") == extra.get("reasoning_content")
    return extra.get("reasoning") or "", choice.message.content or "", calls, choice.finish_reason


def chat_stream(client: openai.OpenAI, tools: Any, thinking: bool) -> Answer:
    reasoning, content, finish = "", "", ""
    calls: dict[int, list[str]] = {}
    ids = set()
    for chunk in client.chat.completions.create(
        model="demo", messages=USER, tools=tools, stream=True, extra_body={"enable_thinking": thinking}
    ):
        [choice] = chunk.choices
        assert not finish
        finish = choice.finish_reason or ""
        reasoning += (choice.delta.model_extra or {}).get("reasoning_content") or ""
        content += choice.delta.content or ""
        for delta in choice.delta.tool_calls or []:
            assert delta.function is not None
            if delta.index not in calls:
                assert delta.id and delta.type == "function" and delta.function.name and delta.function.arguments == ""
                ids.add(delta.id)
                calls[delta.index] = [delta.function.name, ""]
            else:
                assert not delta.id and not delta.function.name
                calls[delta.index][1] += delta.function.arguments or ""
    assert len(ids) == len(calls) and sorted(calls) == list(range(len(calls)))
    return reasoning, content, [(name, arguments) for name, arguments in calls.values()], finish


def responses(client: openai.OpenAI, tools: Any, thinking: bool, stream: bool) -> Answer:
    flat = [{"type": "function", **tool["function"]} for tool in tools or []]
    given: Any = {"model": "demo", "input": USER, "tools": flat, "reasoning": {"effort": "high" if thinking else "none"}}
    if stream:
        with client.responses.stream(**given) as events:
            all_events: list[Any] = list(events)
        seen, made = [event.type for event in all_events], all_events[-1].response
        assert seen[:2] == ["response.created", "response.in_progress"] and seen[-1] in ("response.completed", "response.incomplete")
        assert seen.count("response.output_item.added") == seen.count("response.output_item.done") == len(made.output)
    else:
        made = client.responses.create(**given)
    reasoning, content, calls = "", "", []
    for item in made.output:
        if item.type == "reasoning":
            reasoning += "".join(part.text for part in item.content)
        elif item.type == "message":
            content += "".join(part.text for part in item.content)
        else:
            assert item.type == "function_call" and item.call_id
            calls.append((item.name, item.arguments))
    assert made.status == "completed" or made.incomplete_details.reason == "max_output_tokens"
    return reasoning, content, calls, "length" if made.status == "incomplete" else "tool_calls" if calls else "stop"


def messages(claude: anthropic.Anthropic, tools: Any, thinking: bool, stream: bool) -> Answer:
    functions = [{"name": tool["function"]["name"], "input_schema": tool["function"].get("parameters", {})} for tool in tools or []]
    given: Any = {"model": "demo", "max_tokens": 2000, "messages": USER, "tools": functions}
    if thinking:
        given["thinking"] = {"type": "adaptive"}
    calls: list[tuple[str, str]] = []
    if stream:
        parts: list[str] = []
        with claude.messages.stream(**given) as events:
            for event in events:
                if event.type == "content_block_start":
                    parts.append("")
                elif event.type == "content_block_delta" and event.delta.type == "input_json_delta":
                    parts[event.index] += event.delta.partial_json
            made: Any = events.get_final_message()
        calls = [(block.name, parts[i]) for i, block in enumerate(made.content) if block.type == "tool_use"]
    else:
        made = claude.messages.create(**given)
        calls = [(block.name, json.dumps(block.input, ensure_ascii=False)) for block in made.content if block.type == "tool_use"]
    reasoning = "".join(block.thinking for block in made.content if block.type == "thinking")
    content = "".join(block.text for block in made.content if block.type == "text")
    ends = {"end_turn": "stop", "max_tokens": "length", "tool_use": "tool_calls"}
    return reasoning, content, calls, ends[made.stop_reason]


@pytest.mark.parametrize("case", DATA["cases"], ids=lambda case: case["name"])
def test_calls_of_an_answer(scripted: ScriptedEngine, client: openai.OpenAI, claude: anthropic.Anthropic, case: dict[str, Any]) -> None:
    tools = TOOLS if case.get("tools", True) else None
    complete = case.get("complete", True)
    scripted.text, scripted.step, scripted.finish = case["text"], PIECES, "stop" if complete else "length"
    answers = [
        chat(client, tools, False),
        chat_stream(client, tools, False),
        responses(client, tools, False, stream=False),
        responses(client, tools, False, stream=True),
        messages(claude, tools, False, stream=True),
    ]
    expected = case.get("calls", [])
    for reasoning, content, calls, finish in answers:
        assert not reasoning and content == case.get("content", "")
        assert [name for name, _ in calls] == [call["name"] for call in expected]
        for (_, arguments), call in zip(calls, expected, strict=True):
            if "cut" in call:
                assert arguments == call["cut"]
            else:
                assert json.loads(arguments) == call["arguments"]
        assert finish == ("length" if not complete else "tool_calls" if calls else "stop")
    if not any("cut" in call for call in expected):
        whole = messages(claude, tools, False, stream=False)
        assert [json.loads(arguments) for _, arguments in whole[2]] == [call["arguments"] for call in expected]


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "called"),
    [
        ("Let me see.\n</think>\n\nYes.", "Let me see.", "Yes.", 0),
        ("I call it.\n</think>\n\n<tool_call>\n<function=ping>\n</function>\n</tool_call>", "I call it.", "", 1),
        ("I will.\n<tool_call>\n<function=ping>\n</function>\n</tool_call>", "I will.", "", 1),
        ("hm hm", "hm hm", "", 0),
        ("</think>\n\nYes.", "", "Yes.", 0),
    ],
)
@pytest.mark.parametrize("step", [1, 9])
def test_reasoning_is_apart(
    scripted: ScriptedEngine,
    client: openai.OpenAI,
    claude: anthropic.Anthropic,
    text: str,
    reasoning: str,
    content: str,
    called: int,
    step: int,
) -> None:
    scripted.text, scripted.step, scripted.finish = text, step, "stop"
    for answer in (
        chat(client, TOOLS, True),
        chat_stream(client, TOOLS, True),
        responses(client, TOOLS, True, stream=False),
        responses(client, TOOLS, True, stream=True),
        messages(claude, TOOLS, True, stream=False),
        messages(claude, TOOLS, True, stream=True),
    ):
        assert answer[:2] == (reasoning, content) and len(answer[2]) == called


def test_agents_that_did_not_ask_see_no_thinking(scripted: ScriptedEngine, claude: anthropic.Anthropic) -> None:
    scripted.text, scripted.step, scripted.finish = "<think>\nHm.\n</think>\n\nYes.", 3, "stop"
    assert messages(claude, None, False, stream=True)[:2] == ("", "Yes.")
    assert messages(claude, None, False, stream=False)[:2] == ("", "Yes.")


def test_a_function_of_a_namespace(scripted: ScriptedEngine, client: openai.OpenAI) -> None:
    scripted.text, scripted.finish = "<tool_call>\n<function=commit>\n</function>\n</tool_call>", "stop"
    tools: Any = [{"type": "namespace", "name": "git", "tools": [{"type": "function", "name": "commit", "parameters": {}}]}]
    [item] = client.responses.create(model="demo", input="Go.", tools=tools).output
    assert (
        item.type == "function_call"
        and item.name == "commit"
        and (item.model_extra or {}).get("namespace", getattr(item, "namespace", "")) == "git"
    )
