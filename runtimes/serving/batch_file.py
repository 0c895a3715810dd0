"""OpenAI's batch file format: a line is a request, and a line of the output its answer.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 100}}
    {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}}, "error": null}

https://platform.openai.com/docs/guides/batch. Fields of a body that are not known here are ignored, and null stands for the default.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwen_export.errors import ParameterError, QwenExportError
from qwen_export.runtimes.answer import Generation, Prepared
from qwen_export.runtimes.model import Model
from qwen_export.runtimes.text.reasoning import Content
from qwen_export.runtimes.text.tool_calls import CallArguments, CallStarted, ToolCallParser

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")
_TEXT_TOKENS = 16
"""Tokens of a completion without max_tokens, as in OpenAI's protocol."""
_REFUSED = ("response_format", "structured_outputs", "logprobs", "top_logprobs", "logit_bias", "echo", "suffix")
"""Fields that change the answer and are not supported: ignoring them would be a wrong answer."""


@dataclass
class Line:
    """A line of the file. `error` is what makes it no request that can be run."""

    number: int
    custom_id: str | None
    url: str = ""
    body: Mapping[str, Any] | None = None
    error: QwenExportError | None = None


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
        if body.get(name) not in (None, False, {"type": "text"}):
            raise ParameterError("the field is not supported here", parameter=name, got=repr(body[name])[:80], fix=f"Leave {name} out.")
    for name in ("n", "best_of"):
        if body.get(name, 1) != 1:
            raise ParameterError("one answer per line is given", parameter=name, got=body[name], expected=1, fix="Repeat the line instead.")
    stop = body.get("stop")
    options: dict[str, Any] = {"stop": [stop] if isinstance(stop, str) else stop}
    limit = body.get("max_completion_tokens", body.get("max_tokens", None if line.url == CHAT else _TEXT_TOKENS))
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ParameterError(
            "the number of tokens is not usable", parameter="max_tokens", got=repr(limit), expected="an integer >= 1", fix="Raise it."
        )
    options["max_new_tokens"] = limit
    given = {name: body[name] for name in _SAMPLING if name in body}
    if line.url == TEXT:
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
    tools = None if body.get("tool_choice") == "none" else body.get("tools") or None
    prepared = model.prepare_chat(_required(body, "messages"), tools=tools, template_kwargs=variables or None, **switches, **options)
    if given:
        thinking = prepared.splitter is not None and prepared.splitter.in_reasoning
        sampling = replace(model.recommended(thinking), **given)
        prepared = model.prepare_chat(
            body["messages"], tools=tools, template_kwargs=variables or None, sampling=sampling, **switches, **options
        )
    return prepared


def answer_line(line: Line, answer: Generation) -> dict[str, Any]:
    """The line of an answer that has ended."""
    statistics = answer.statistics
    usage = {
        "prompt_tokens": statistics.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "total_tokens": statistics.prompt_tokens + len(answer.tokens),
        "prompt_tokens_details": {"cached_tokens": statistics.reused_tokens},
    }
    finish = "stop" if statistics.finish == "stop" else "length"
    body = line.body or {}
    common = {"created": int(time.time()), "model": body.get("model", ""), "usage": usage}
    choice: dict[str, Any]
    if line.url == TEXT:
        choice = {"index": 0, "text": answer.content, "finish_reason": finish, "logprobs": None}
        made = {"id": "cmpl-" + secrets.token_hex(12), "object": "text_completion", "choices": [choice], **common}
        return _line(line, 200, made)
    message, calls = _message(answer, body.get("tools"), complete=finish == "stop")
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls and finish == "stop" else finish, "logprobs": None}
    return _line(line, 200, {"id": "chatcmpl-" + secrets.token_hex(12), "object": "chat.completion", "choices": [choice], **common})


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
