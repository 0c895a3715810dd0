"""The protocols with the official clients, field by field, against a real bundle: shapes that hold whatever the model says."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.support.live_server import LiveServer

HI: list[Any] = [{"role": "user", "content": "def add(a, b):"}]
OFF = {"enable_thinking": False}


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def http(server: LiveServer) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60)


def chat(client: openai.OpenAI, **more: Any) -> Any:
    given: dict[str, Any] = {"model": "demo", "messages": HI, "max_tokens": 16, "temperature": 0, "extra_body": OFF, **more}
    return client.chat.completions.create(**given)


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert isinstance(error["message"], str) and error["type"] and "detail" not in answer.json()
    return error


def test_models(client: openai.OpenAI, http: httpx.Client) -> None:
    found = client.models.list()
    assert found.object == "list" and [model.id for model in found.data] == ["demo"]
    assert http.get("/v1/models/demo").json()["max_model_len"] == 1024
    assert http.get("/v1/models/demo").json()["capabilities"] == {"vision": False}
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("absent")
    assert caught.value.code == "model_not_found"


def test_a_whole_answer(client: openai.OpenAI) -> None:
    made = chat(client)
    [choice] = made.choices
    assert made.object == "chat.completion" and made.id.startswith("chatcmpl-") and made.model == "demo"
    assert choice.message.role == "assistant" and choice.message.content and choice.message.tool_calls is None
    assert choice.finish_reason == "length" and made.usage.completion_tokens == 16
    assert made.usage.total_tokens == made.usage.prompt_tokens + 16


def test_a_stream(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert body[0].choices[0].delta.role == "assistant" and body[0].choices[0].delta.content == ""
    assert [chunk.choices[0].finish_reason for chunk in body[:-1]] == [None] * (len(body) - 1)
    assert body[-1].choices[0].finish_reason == "length" and body[-1].choices[0].delta.content is None
    assert last.choices == [] and last.usage.completion_tokens == 16 and not any(chunk.usage for chunk in body)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in body)
    assert text == chat(client).choices[0].message.content
    counted = list(chat(client, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}))
    assert all(chunk.usage for chunk in counted)


def test_a_stream_as_it_is_written(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/chat/completions", json={"messages": HI, "max_tokens": 3, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["x-accel-buffering"] == "no"
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])


def test_several_choices(client: openai.OpenAI) -> None:
    made = chat(client, n=3, temperature=1.0, seed=5)
    assert [choice.index for choice in made.choices] == [0, 1, 2] and len({c.message.content for c in made.choices}) > 1
    assert made.usage.completion_tokens == 48 and made.usage.prompt_tokens == chat(client).usage.prompt_tokens
    texts = ["", "", ""]
    ends = []
    for chunk in chat(client, n=3, temperature=1.0, seed=5, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in made.choices] and sorted(ends) == [0, 1, 2]


def test_stop_strings(client: openai.OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    stop = whole[5:8]
    made = chat(client, stop=[stop, "never found"]).choices[0]
    assert made.message.content == whole[: whole.index(stop)] and made.finish_reason == "stop"
    assert made.model_extra["stop_reason"] == stop
    kept = chat(client, stop=stop, extra_body={**OFF, "include_stop_str_in_output": True}).choices[0]
    assert kept.message.content == whole[: whole.index(stop) + len(stop)]


def test_seeds_repeat(client: openai.OpenAI) -> None:
    assert len({chat(client, temperature=1.0, seed=7).choices[0].message.content for _ in range(3)}) == 1
    assert len({chat(client, temperature=1.5, seed=seed).choices[0].message.content for seed in range(5)}) > 1


def test_log_probabilities(client: openai.OpenAI) -> None:
    made = chat(client, logprobs=True, top_logprobs=3).choices[0]
    entries = made.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == made.message.content and len(entries) == 16
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


def test_reasoning_has_two_names_and_is_counted(client: openai.OpenAI) -> None:
    made = chat(client, extra_body={"enable_thinking": True}, max_tokens=64)
    extra = made.choices[0].message.model_extra
    assert extra["reasoning_content"] == extra["reasoning"] and extra["reasoning"]
    assert 0 < made.usage.completion_tokens_details.reasoning_tokens <= 64
    deltas = [chunk.choices[0].delta for chunk in chat(client, extra_body={"enable_thinking": True}, max_tokens=64, stream=True)]
    assert "".join(delta.model_extra.get("reasoning_content", "") for delta in deltas) == extra["reasoning"]
    again = [*HI, {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}, {"role": "user", "content": "Again."}]
    assert chat(client, messages=again, extra_body={"preserve_thinking": True}).choices


def test_a_second_turn_is_cached(client: openai.OpenAI) -> None:
    text = "A text of its own, for this test alone, with some words more. " * 4
    turns: list[Any] = [{"role": "user", "content": text}]
    first = chat(client, messages=turns)
    turns += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "Go on."}]
    second = chat(client, messages=turns)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens // 2


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "developer", "content": "Be short."}, {"role": "system", "content": "Be kind."}, *HI],
        [*HI, {"role": "system", "content": "A reminder."}, {"role": "user", "content": "Go on."}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
        [*HI, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "call_1", "content": "done"}],
        [*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "function", "name": "f", "content": "done"}],
        [
            *HI,
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"a": '}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "error"}]},
        ],
        [*HI, {"role": "assistant"}, {"role": "user", "content": "Are you there?"}],
    ],
    ids=str,
)
def test_turns_as_clients_write_them(http: httpx.Client, turns: list[dict[str, Any]]) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": turns, "tools": [TOOL], "max_tokens": 2, **OFF})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/chat/completions", {"messages": HI, "model": "absent"}, 404, "model_not_found"),
        ("/v1/chat/completions", {"messages": []}, 400, "invalid_value"),
        ("/v1/chat/completions", {"messages": HI, "temperature": -1}, 400, "invalid_value"),
        ("/v1/chat/completions", {"messages": HI, "top_p": 0}, 400, "invalid_value"),
        ("/v1/chat/completions", {}, 400, "missing_field"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "template_error"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "context_length_exceeded"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 1_000_000}]}, 400, "context_length_exceeded"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "invalid_value",
        ),
        ("/v1/completions", {"prompt": [1 << 40]}, 400, "invalid_value"),
        ("/v1/embeddings", {"input": "a"}, 404, "not_found"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refusals(http: httpx.Client, path: str, body: dict[str, Any], status: int, code: str) -> None:
    assert error_of(http.post(path, json=body), status)["code"] == code


def test_other_methods_and_no_json(http: httpx.Client) -> None:
    error_of(http.get("/v1/chat/completions"), 405)
    error_of(http.post("/v1/chat/completions", content=b'{"messages": '), 400)
    error_of(http.get("/v1/responses/resp_1"), 404)
    assert http.post("/v1/messages", content=b"[]").json() == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "the body is not an object: got list. Send one JSON object."},
    }


def test_limits_are_clipped_to_the_context(http: httpx.Client) -> None:
    made = http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 32_000, "ignore_eos": True, **OFF}).json()
    assert made["choices"][0]["finish_reason"] == "length" and made["usage"]["total_tokens"] == 1024


def test_completions(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": "demo", "prompt": "def add(a, b):", "max_tokens": 6, "temperature": 0}
    made = client.completions.create(**given)
    assert made.object == "text_completion" and made.choices[0].finish_reason == "length" and made.usage
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**given, stream=True)) == made.choices[0].text
    assert client.completions.create(**given, echo=True).choices[0].text == given["prompt"] + made.choices[0].text
    batch = client.completions.create(**{**given, "prompt": [[1, 2, 3], [4, 5]], "n": 2})
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3] and batch.usage and batch.usage.prompt_tokens == 5
    lists = client.completions.create(**given, logprobs=2).choices[0].logprobs
    assert lists and lists.tokens and "".join(lists.tokens) == made.choices[0].text
    assert lists.text_offset == [len("".join(lists.tokens[:i])) for i in range(6)]


def test_tokens_there_and_back(http: httpx.Client) -> None:
    made = http.post("/tokenize", json={"prompt": "def add(a, b):"}).json()
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"]) and made["max_model_len"] == 1024
    assert http.post("/detokenize", json={"tokens": made["tokens"]}).json() == {"prompt": "def add(a, b):"}
    turns = http.post("/tokenize", json={"messages": HI}).json()
    assert turns["count"] == http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    error_of(http.post("/detokenize", json={"tokens": [-1]}), 400)
    error_of(http.post("/tokenize", json={}), 400)


def test_messages(server: LiveServer) -> None:
    claude = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)
    given: Any = {"model": "demo", "max_tokens": 16, "system": "Be short.", "messages": HI, "extra_body": {"temperature": 0}}
    made = claude.messages.create(**given)
    assert made.role == "assistant" and made.stop_reason == "max_tokens" and made.usage.output_tokens == 16
    with claude.messages.stream(**given) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_message().content[0].text == made.content[0].text
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and "message_delta" in kinds
    stopped = claude.messages.create(**given, stop_sequences=[made.content[0].text[4:6]])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == made.content[0].text[4:6]
    counted = claude.messages.count_tokens(model="demo", messages=HI, system="Be short.").input_tokens
    assert counted == made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0)


def test_responses(client: openai.OpenAI) -> None:
    made = client.responses.create(model="demo", input="def add(a, b):", max_output_tokens=16, temperature=0, reasoning={"effort": "none"})
    assert made.object == "response" and made.status == "incomplete" and made.output_text and made.usage
    assert made.usage.output_tokens == 16 and made.incomplete_details and made.incomplete_details.reason == "max_output_tokens"
    events: list[Any] = list(
        client.responses.create(
            model="demo", input="def add(a, b):", max_output_tokens=16, temperature=0, reasoning={"effort": "none"}, stream=True
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == made.output_text


def test_metrics_and_health(server: LiveServer, http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200 and http.get("/version").json()["version"]
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    labels = '{engine="0",model_name="demo"}'
    for name in ("num_requests_running", "num_requests_waiting", "prompt_tokens_total", "generation_tokens_total"):
        assert f"vllm:{name}{labels}" in answer.text.replace('{model_name="demo",engine="0"}', labels)
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert f"vllm:{name}_bucket" in answer.text
    assert 'finished_reason="length"' in answer.text and "qwen_slots" in answer.text
