"""What a request says becomes what the engine is asked for, and what it cannot have is refused before anything runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen_export.errors import ParameterError
from qwen_export.runtimes.server.chat_request import ChatBody, chat_ask
from qwen_export.runtimes.server.completion_request import CompletionBody, completion_ask
from qwen_export.runtimes.server.messages_request import MessagesBody, messages_ask
from qwen_export.runtimes.server.request_body import parse_body
from qwen_export.runtimes.server.responses_request import ResponsesBody, responses_ask
from qwen_export.runtimes.server.wire_errors import HttpError, refusal_of
from qwen_export.runtimes.structured.answer_options import AnswerForm, ToolName

USER = [{"role": "user", "content": "Hi."}]
SET_CITY = {"type": "function", "function": {"name": "set_city", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> Any:
    return chat_ask(parse_body(json.dumps({"messages": USER, **fields}).encode(), ChatBody))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [SET_CITY], "tool_choice": {"type": "function", "function": {"name": "absent"}}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"best_of": 3}, "best_of"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"temperature": "warm"}, "temperature"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
    ],
    ids=str,
)
def test_fields_out_of_range_are_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises((HttpError, ParameterError)) as caught:
        chat(**fields)
    refusal = refusal_of(caught.value)
    assert refusal.status == 400 and refusal.field == field and refusal.message.endswith(".")
    error = refusal.openai()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == field and error["code"]


def test_null_is_the_default_and_unknown_fields_are_ignored() -> None:
    names = ("temperature", "max_tokens", "stop", "tools", "tool_choice", "stream_options", "logit_bias", "n", "seed", "response_format")
    assert chat(**dict.fromkeys(names), made_up=1, store=True, metadata={"a": 1}, user="me") == chat()
    assert chat(tools=[]) == chat() and chat(best_of=1) == chat() and chat(response_format={"type": "text"}) == chat()


def test_the_second_limit_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).max_tokens == 7 and chat(max_tokens=5).max_tokens == 5


def test_sampling_keeps_what_is_given_only() -> None:
    assert chat().sampling == {}
    assert chat(temperature=0, seed=-1).sampling == {"temperature": 0.0, "greedy": False, "seed": (1 << 63) - 1}
    assert chat(top_k=-1).sampling == {"top_k": 0}


def test_thinking_is_switched_by_every_name() -> None:
    assert chat(enable_thinking=False).template["enable_thinking"] is False
    assert chat(chat_template_kwargs={"enable_thinking": False}).template["enable_thinking"] is False
    ask = chat(reasoning_effort="none")
    assert ask.template["enable_thinking"] is False and not ask.variables
    assert chat(reasoning_effort="low").variables == {"reasoning_effort": "low"}
    assert chat(thinking_budget=5).options.thinking_budget == 5
    assert chat(thinking_budget=5, thinking_token_budget=0).options.thinking_budget == 0


def test_forms() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    form = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}).options.form
    assert form == AnswerForm("json_schema", schema) and list(form.value["properties"]) == ["b", "a"]
    assert chat(response_format={"type": "json_object"}).options.form == AnswerForm("json_object")
    assert chat(structured_outputs={"choice": ["a", "b"]}).options.form == AnswerForm("choice", ("a", "b"))
    assert chat(structured_outputs={"regex": "a+"}).options.form == AnswerForm("regex", "a+")


def test_choices_of_tools() -> None:
    assert chat(tools=[SET_CITY]).tools == [SET_CITY] and chat(tools=[SET_CITY]).options.tool_choice == "auto"
    none = chat(tools=[SET_CITY], tool_choice="none")
    assert none.tools == [SET_CITY] and none.options.tool_choice == "none"
    named = chat(tools=[SET_CITY], tool_choice={"type": "function", "function": {"name": "set_city"}})
    assert named.options.tool_choice == ToolName("set_city")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 200_000, b'{"messages": [1]}', b"nan"], ids=lambda body: repr(body[:9])
)
def test_bodies_that_are_no_request(body: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        parse_body(body, ChatBody)
    assert caught.value.status == 400 and caught.value.fix


def completion(**fields: Any) -> Any:
    return completion_ask(parse_body(json.dumps({"prompt": "a", **fields}).encode(), CompletionBody))


def test_prompts_of_completions() -> None:
    assert completion().prompts == ["a"] and completion().max_tokens == 16
    assert completion(prompt=["a", "b"], n=2).count == 4
    assert completion(prompt=[1, 2]).prompts == [[1, 2]] and completion(prompt=[[1], [2, 3]]).prompts == [[1], [2, 3]]
    assert completion(echo=True, max_tokens=0).max_tokens == 1
    for wrong in ({"max_tokens": 0}, {"prompt": []}, {"prompt": ""}, {"prompt": [[]]}, {"suffix": "x"}, {"logprobs": 99}):
        with pytest.raises((HttpError, ParameterError)):
            completion(**wrong)


def responses(**fields: Any) -> Any:
    return responses_ask(parse_body(json.dumps({"input": "Hi.", **fields}).encode(), ResponsesBody))


def test_items_of_a_turn_are_one_message() -> None:
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be short."}]},
        {"role": "user", "content": "Choose."},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}], "encrypted_content": None},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "On it."}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}', "id": "fc_1", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{"},
        {"type": "function_call_output", "call_id": "c1", "output": "done"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "no"}]},
        {"type": "web_search_call", "id": "ws_1"},
    ]
    ask = responses(input=items, instructions="x", tools=[{"type": "function", "name": "f", "parameters": {}}])
    assert [message["role"] for message in ask.messages] == ["system", "developer", "user", "assistant", "tool", "tool"]
    turn = ask.messages[3]
    assert turn["reasoning_content"] == "Hm." and turn["content"] == [{"type": "output_text", "text": "On it."}]
    assert [call["function"]["name"] for call in turn["tool_calls"]] == ["f", "g"]


def test_tools_of_a_provider_are_skipped_and_namespaces_kept() -> None:
    tools = [
        {"type": "web_search"},
        {"type": "custom", "name": "patch"},
        {"type": "namespace", "name": "git", "tools": [{"type": "function", "name": "commit", "parameters": {}}]},
        {"type": "function", "name": "f", "description": "", "parameters": {}, "strict": True},
    ]
    assert [tool["function"]["name"] for tool in responses(tools=tools).tools] == ["commit", "f"]


@pytest.mark.parametrize("field", ["previous_response_id", "background", "conversation"])
def test_nothing_is_stored(field: str) -> None:
    with pytest.raises(HttpError) as caught:
        responses(**{field: "resp_1" if field != "background" else True})
    assert caught.value.field == field


def messages(**fields: Any) -> Any:
    return messages_ask(parse_body(json.dumps({"messages": USER, "max_tokens": 5, **fields}).encode(), MessagesBody))


def test_blocks_become_messages() -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Choose.", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "On it."},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "ok"}, {"type": "text", "text": "Go on."}]},
    ]
    ask = messages(messages=turns, system=[{"type": "text", "text": "A"}, {"type": "text", "text": "B"}])
    system, user, assistant, tool, last = ask.messages
    assert system == {"role": "system", "content": "A\n\nB"} and user["content"] == [{"type": "text", "text": "Choose."}]
    assert assistant["content"] == "On it." and assistant["reasoning_content"] == "Hm."
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert tool == {"role": "tool", "tool_call_id": "t1", "content": "ok"} and last["content"] == [{"type": "text", "text": "Go on."}]


def test_thinking_is_off_unless_asked_for() -> None:
    assert messages().template == {"enable_thinking": False}
    ask = messages(thinking={"type": "enabled", "budget_tokens": 1024})
    assert ask.template == {"enable_thinking": True} and ask.options.thinking_budget == 1024
    assert messages(thinking={"type": "disabled", "budget_tokens": 9}).options.thinking_budget is None


def test_tools_of_messages() -> None:
    tools = [{"name": "f", "input_schema": {"type": "object"}}, {"type": "web_search_20250305", "name": "web_search"}]
    ask = messages(tools=tools, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert [tool["function"]["name"] for tool in ask.tools] == ["f"]
    assert ask.options.tool_choice == "required" and not ask.options.parallel_tool_calls
    with pytest.raises(ParameterError):
        messages(tools=tools, tool_choice={"type": "tool", "name": "web_search"})
