"""OpenAI's batch file format: a line is a request, and a line of the output its answer.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 100}}
    {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}}, "error": null}

https://platform.openai.com/docs/guides/batch. Fields of a body that are not known here are ignored, and null stands for the default.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qwen_export.errors import ParameterError, QwenExportError
from qwen_export.runtimes.answer import Generation, Prepared
from qwen_export.runtimes.model import Model
from qwen_export.runtimes.serving.batch_logprobs import chat_logprobs, text_logprobs
from qwen_export.runtimes.serving.batch_options import answer_options
from qwen_export.runtimes.structured.answer_events import TokenLogprob
from qwen_export.runtimes.text.reasoning import Content
from qwen_export.runtimes.text.tool_calls import CallArguments, CallStarted, ToolCallParser

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")
_TEXT_TOKENS = 16
"""Tokens of a completion without max_tokens, as in OpenAI's protocol."""
_REFUSED = ("best_of", "suffix")
"""Fields that change the answer and are not supported: ignoring them would be a wrong answer."""


@dataclass
class Line:
    """A line of the file. `error` is what makes it no request that can be run."""

    number: int
    custom_id: str | None
    url: str = ""
    body: Mapping[str, Any] | None = None
    error: QwenExportError | None = None


class Answered(NamedTuple):
    """An answer that has ended, and its tokens where log probabilities were wanted."""

    answer: Generation
    tokens: list[TokenLogprob]


def read_line(number: int, text: str) -> Line:
    """Line `number`, from 1, of a file of requests."""
    where = f"line {number}"
    try:
        fields = json.loads(text)
    except ValueError as error:
        return Line(number, None, error=_wrong("the line is not JSON", where, str(error), "one JSON object per line"))
    if not isinstance(fields, dict):
        return Line(number, None, error=_wrong("the line is not an object", where, type(fields).__name__, "a JSON object"))
    custom_id, url, body = fields.get("custom_id"), fields.get("url"), fields.get("body")
    if not isinstance(custom_id, str):
        return Line(number, None, error=_wrong("the request has no name", where, f"custom_id {custom_id!r}", "a text"))
    if fields.get("method", "POST") != "POST" or url not in (CHAT, TEXT):
        got = f"{fields.get('method', 'POST')} {url}"
        return Line(number, custom_id, error=_wrong("the request is of another kind", where, got, f"POST {CHAT} or {TEXT}"))
    if not isinstance(body, dict):
        return Line(number, custom_id, error=_wrong("the request has no body", where, type(body).__name__, "an object"))
    return Line(number, custom_id, url, {name: value for name, value in body.items() if value is not None})


def prepare(model: Model, line: Line) -> Prepared:
    """The request of a line. Raises QwenExportError where it cannot be run."""
    if line.error is not None or line.body is None:
        raise line.error or AssertionError("a line without error has a body")
    body = line.body
    for name in _REFUSED:
        if body.get(name) not in (None, 1, ""):
            raise ParameterError("the field is not supported here", parameter=name, got=repr(body[name])[:80], fix=f"Leave {name} out.")
    wanted = answer_options(body, chat=line.url == CHAT)
    stop = body.get("stop")
    options: dict[str, Any] = {"stop": [stop] if isinstance(stop, str) else stop, "answer": wanted}
    limit = body.get("max_completion_tokens", body.get("max_tokens", None if line.url == CHAT else _TEXT_TOKENS))
    least = 0 if wanted.prompt_logprobs is not None else 1
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < least):
        expected = f"an integer >= {least}"
        raise ParameterError(
            "the number of tokens is not usable", parameter="max_tokens", got=repr(limit), expected=expected, fix="Raise it."
        )
    options["max_new_tokens"] = limit
    given = {name: body[name] for name in _SAMPLING if name in body}
    if line.url == TEXT:
        if body.get("echo") is True and not isinstance(body.get("prompt"), str):
            raise ParameterError(
                "the prompt cannot be repeated", parameter="echo", got="token ids", expected="a text", fix="Give the text."
            )
        options["sampling"] = replace(model.recommended(False), **given)
        return model.prepare_text(_required(body, "prompt"), **options)
    variables = body.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise ParameterError(
            "the template variables cannot be read",
            parameter="chat_template_kwargs",
            got=type(variables).__name__,
            expected="an object",
            fix="Give an object.",
        )
    variables = dict(variables)
    switches = {name: variables.pop(name, body.get(name)) for name in ("enable_thinking", "preserve_thinking")}
    tools = body.get("tools") or None
    prepared = model.prepare_chat(_required(body, "messages"), tools=tools, template_kwargs=variables or None, **switches, **options)
    if given:
        thinking = prepared.splitter is not None and prepared.splitter.in_reasoning
        sampling = replace(model.recommended(thinking), **given)
        prepared = model.prepare_chat(
            body["messages"], tools=tools, template_kwargs=variables or None, sampling=sampling, **switches, **options
        )
    return prepared


def answer_line(line: Line, answers: Sequence[Answered]) -> dict[str, Any]:
    """The line of answers to one request that have ended."""
    statistics, body = answers[0].answer.statistics, line.body or {}
    new = sum(len(one.answer.tokens) for one in answers)
    usage = {
        "prompt_tokens": statistics.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": statistics.prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": statistics.reused_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(one.answer.statistics.reasoning_tokens for one in answers)},
    }
    common = {"created": int(time.time()), "model": body.get("model", ""), "usage": usage}
    choice = _text_choice if line.url == TEXT else _chat_choice
    choices = [choice(body, index, one) for index, one in enumerate(answers)]
    kind, name = ("cmpl-", "text_completion") if line.url == TEXT else ("chatcmpl-", "chat.completion")
    return _line(line, 200, {"id": kind + secrets.token_hex(12), "object": name, "choices": choices, **common})


def _text_choice(body: Mapping[str, Any], index: int, one: Answered) -> dict[str, Any]:
    answer, text, tokens, first = one.answer, one.answer.content, list[TokenLogprob | None](one.tokens), b""
    if body.get("echo") is True:
        text = body["prompt"] + text
        tokens = [*answer.prompt_logprobs, *tokens]
        first = body["prompt"].encode()
        rest = sum(len(token.text) for token in answer.prompt_logprobs if token is not None)
        first = first[: len(first) - rest]
    logprobs = None if body.get("logprobs") is None else text_logprobs(tokens, first)
    reason = answer.statistics.stop_reason
    return {"index": index, "text": text, "finish_reason": _finish(answer), "stop_reason": reason, "logprobs": logprobs}


def _chat_choice(body: Mapping[str, Any], index: int, one: Answered) -> dict[str, Any]:
    answer, finish = one.answer, _finish(one.answer)
    tools = None if body.get("tool_choice") == "none" else body.get("tools")
    message, calls = _message(answer, tools, complete=finish == "stop")
    logprobs = chat_logprobs(one.tokens) if body.get("logprobs") is True else None
    reason, finish = answer.statistics.stop_reason, "tool_calls" if calls and finish == "stop" else finish
    return {"index": index, "message": message, "finish_reason": finish, "stop_reason": reason, "logprobs": logprobs}


def _finish(answer: Generation) -> str:
    return "stop" if answer.statistics.finish == "stop" else "length"


def error_line(line: Line, error: QwenExportError, status: int = 400) -> dict[str, Any]:
    """The line of a request that could not be answered."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    parameter = error.parameter if isinstance(error, ParameterError) else None
    return _line(line, status, {"error": {"message": str(error), "type": kind, "param": parameter, "code": None}})


def _message(answer: Generation, tools: Any, *, complete: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    content = answer.content
    calls: list[dict[str, Any]] = []
    if tools:
        parser = ToolCallParser(tools)
        content = ""
        for event in [*parser.push(answer.content), *parser.flush(complete)]:
            if isinstance(event, Content):
                content += event.text
            elif isinstance(event, CallStarted):
                calls.append({"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}})
            elif isinstance(event, CallArguments):
                calls[event.index]["function"]["arguments"] += event.text
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    if answer.reasoning:
        message["reasoning_content"] = message["reasoning"] = answer.reasoning
    if calls:
        message["tool_calls"] = calls
    return message, calls


def _line(line: Line, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": secrets.token_hex(12), "body": body}
    return {"id": "batch_req_" + secrets.token_hex(12), "custom_id": line.custom_id, "response": response, "error": None}


def _required(body: Mapping[str, Any], name: str) -> Any:
    if name not in body:
        raise ParameterError(f"the body has no {name}", parameter=name, fix=f"Give {name}.")
    return body[name]


def _wrong(what: str, where: str, got: str, expected: str) -> QwenExportError:
    return QwenExportError(what, where=where, got=got[:200], expected=expected, fix="Correct the line and run the file again.")
