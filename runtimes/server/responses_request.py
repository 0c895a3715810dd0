"""The body of /v1/responses, as a request to the engine. Nothing is stored: each request has the whole conversation.

Items that follow each other and are one turn of the assistant (its reasoning, its text, its calls) become one message. Kinds of items and
tools that are not known are skipped: clients send tools of the provider's that they can do without.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from qwen_export.runtimes.server.ask import Ask
from qwen_export.runtimes.server.chat_request import tool_choice
from qwen_export.runtimes.server.request_body import AnswerBody
from qwen_export.runtimes.server.sampling_body import answer_form, wrong
from qwen_export.runtimes.server.wire_errors import HttpError
from qwen_export.runtimes.structured.answer_options import AnswerOptions

_log = logging.getLogger("qwen_export.server")


class ResponsesBody(AnswerBody):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    stream: bool = False
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool = False


def responses_ask(body: ResponsesBody) -> Ask:
    """Raises HttpError and ParameterError for fields that cannot be used."""
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(body, name):
            raise HttpError(
                "responses are not stored here",
                code="unsupported_field",
                field=name,
                fix=f"Leave {name} out and send the whole conversation.",
            )
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise wrong("max_output_tokens", body.max_output_tokens, "at least 1")
    options = AnswerOptions(
        form=answer_form((body.text or {}).get("format"), None),
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
    )
    found, _ = functions(body.tools)
    options.check_tools([function["name"] for function in found])
    tools: list[dict[str, Any]] = [{"type": "function", "function": function} for function in found]
    effort = (body.reasoning or {}).get("effort")
    sampling = {name: value for name in ("temperature", "top_p") if (value := getattr(body, name)) is not None}
    if "temperature" in sampling:
        sampling["greedy"] = False
    return Ask(
        messages=_messages(body),
        tools=tools or None,
        template={"enable_thinking": False if effort == "none" else None},
        variables={"reasoning_effort": effort} if effort not in (None, "none") else {},
        sampling=sampling,
        max_tokens=body.max_output_tokens,
        options=options,
    )


def _choice(given: str | dict[str, Any] | None) -> Any:
    if isinstance(given, Mapping) and given.get("type") == "allowed_tools":
        return tool_choice(given.get("mode", "auto"))
    return tool_choice(given)


def functions(tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The functions among the tools, as chat completions have them, and the namespaces of those that are in one."""
    found: list[dict[str, Any]] = []
    namespaces: dict[str, str] = {}
    for tool in tools:
        inner = tool.get("tools") if tool.get("type") == "namespace" else [tool]
        for one in inner if isinstance(inner, list) else []:
            if not isinstance(one, Mapping) or one.get("type") != "function" or not isinstance(one.get("name"), str):
                _log.info("a tool of type %s is skipped", tool.get("type"))
                continue
            if tool.get("type") == "namespace":
                namespaces[one["name"]] = str(tool.get("name"))
            found.append({name: one[name] for name in ("name", "description", "parameters", "strict") if one.get(name) is not None})
    return found, namespaces


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if body.instructions:
        made.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*made, {"role": "user", "content": body.input}]
    turn: dict[str, Any] | None = None
    """The assistant's, while items of it come."""
    for number, item in enumerate(body.input):
        kind = item.get("type", "message")
        if kind in ("reasoning", "function_call") or (kind == "message" and item.get("role") == "assistant"):
            if turn is None or not _joins(turn, kind):
                turn = {"role": "assistant", "content": None}
                made.append(turn)
            _add(turn, item, kind)
            continue
        if kind == "message":
            made.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call_output":
            made.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        else:
            _log.info("item %d of type %s is skipped", number, kind)
            continue
        turn = None
    return [message for message in made if message["role"] != "assistant" or len(message) > 2 or message["content"] is not None]


def _joins(turn: Mapping[str, Any], kind: str) -> bool:
    """Whether an item continues the turn: reasoning, text and calls come in this order."""
    if kind == "function_call":
        return True
    if kind == "message":
        return turn["content"] is None and "tool_calls" not in turn
    return len(turn) == 2 and turn["content"] is None


def _add(turn: dict[str, Any], item: Mapping[str, Any], kind: str) -> None:
    if kind == "message":
        turn["content"] = item.get("content")
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        text = "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
        if text:
            turn["reasoning_content"] = text
    else:
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        turn.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": function})
