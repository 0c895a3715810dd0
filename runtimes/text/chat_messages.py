"""Chat messages as callers and protocols write them, checked, and brought to the form that templates know.

role         `developer` is `system`, where the template does not know it; `function` is `tool`
content      a text or a list of text parts (`text`, `input_text`, `output_text`, `refusal`), and of pictures where the bundle sees
             (`media_parts.py`); none or missing is the empty text
reasoning    is `reasoning_content`
tool calls   arguments as a mapping or as JSON text (`parse_arguments`)
tool results in the order of the calls that they answer: templates write no ids
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_export.errors import ParameterError
from qwen_export.runtimes.text.media_parts import media_part

Message = Mapping[str, Any]

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# Words in the type or the keys of parts that hold something else than text.
_MEDIA = ("image", "video", "audio", "file", "document")


def check_messages(messages: Sequence[Message]) -> None:
    """Raise ParameterError for what is not a list of messages; whether roles and their order fit is decided by the template."""
    if isinstance(messages, (str, bytes)):
        raise ParameterError(
            "a chat is a list of messages, not a text",
            parameter="messages",
            got=type(messages).__name__,
            expected="a list of messages",
            fix='Pass [{"role": "user", "content": TEXT}], or continue a plain text with `complete`.',
        )
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        raise _bad("", "the messages cannot be read", type(messages).__name__, "a list of messages")
    if not messages:
        raise _bad("", "there are no messages", "an empty list", "at least one message")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise _bad(where, "a message cannot be read", type(message).__name__, "a mapping with 'role' and 'content'")
        if not isinstance(message.get("role"), str):
            raise _bad(where, "the role cannot be read", repr(message.get("role")), "a string such as 'user'")
        _check_content(where, message)
        for key in ("reasoning_content", "reasoning"):
            if message.get(key) is not None and not isinstance(message[key], str):
                raise _bad(where, f"the {key} cannot be read", type(message[key]).__name__, "a string")
        _check_tool_calls(where, message.get("tool_calls"))


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Raise ParameterError for what is not a list of JSON schemas of functions."""
    if tools is not None and (isinstance(tools, (str, bytes, Mapping)) or not all(isinstance(tool, Mapping) for tool in tools)):
        raise ParameterError(
            "the tools cannot be read",
            parameter="tools",
            got=type(tools).__name__,
            expected="a list of mappings",
            fix='Pass one {"type": "function", "function": {...}} for each function.',
        )


def _check_content(where: str, message: Message) -> None:
    content = message.get("content")
    if "content" not in message and not message.get("tool_calls"):
        raise _bad(where, "the content is missing", "nothing", "a string")
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)) or not all(isinstance(part, Mapping) for part in content):
        raise _bad(
            where, "the content cannot be read", type(content).__name__, 'a string or a list of parts {"type": "text", "text": TEXT}'
        )


def _check_tool_calls(where: str, calls: object) -> None:
    if calls is None:
        return
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise _bad(where, "the tool_calls cannot be read", type(calls).__name__, "a list of mappings")
    for i, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _bad(f"{where}.tool_calls[{i}]", "a tool call cannot be read", repr(call), "a function with a name")


def _bad(where: str, what: str, got: str, expected: str) -> ParameterError:
    return ParameterError(what, parameter="messages", where=where, got=got, expected=expected, fix=f"Give {expected}.")


def normalize_messages(messages: Sequence[Message], template_source: str, *, sees: bool = False) -> list[dict[str, Any]]:
    """A copy in the form that templates know. Raises ParameterError for parts that the bundle cannot read: what is not text, or, where it
    `sees`, neither text nor a picture or video (`media_parts.py`)."""
    check_messages(messages)
    normal: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        copy = dict(message)
        if copy["role"] == "developer" and "developer" not in template_source:
            copy["role"] = "system"
        elif copy["role"] == "function":
            copy["role"] = "tool"
        content = copy.get("content")
        copy["content"] = "" if content is None else content
        if isinstance(content, (list, tuple)):
            copy["content"] = [_part(part, f"messages[{i}].content[{j}]", sees=sees) for j, part in enumerate(content)]
        if isinstance(copy.get("reasoning"), str) and copy.get("reasoning_content") is None:
            copy["reasoning_content"] = copy["reasoning"]
        normal.append(copy)
    return _in_order_of_calls(normal)


def _part(part: Mapping[str, Any], where: str, *, sees: bool) -> dict[str, Any]:
    return (media_part(part, where) if sees else None) or _text_part(part, where)


def _text_part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = part.get("type", "text")
    text = part.get(_TEXT_PARTS.get(kind, ""))
    if isinstance(text, str):
        return {"type": "text", "text": text}
    if isinstance(kind, str) and any(word in name for name in (kind, *part) if isinstance(name, str) for word in _MEDIA):
        raise ParameterError(
            "a message holds something else than text, which the bundle cannot read",
            parameter="messages",
            where=where,
            got=f"a part of type {kind}" if kind != "text" else f"a part with {', '.join(map(str, part))}",
            expected="text",
            fix="Remove pictures, video, audio and files from the messages, or describe them in words.",
        )
    raise _bad(where, "a part of the content cannot be read", repr(dict(part))[:200], '{"type": "text", "text": TEXT}')


def _in_order_of_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of tool results, sorted as the calls before them. Runs with ids that fit no call stay as they are."""
    start = 0
    while start < len(messages):
        calls = messages[start].get("tool_calls") or ()
        start += 1
        end = start
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        order = {call["id"]: i for i, call in enumerate(calls) if isinstance(call.get("id"), str)}
        results = messages[start:end]
        if order and all(result.get("tool_call_id") in order for result in results):
            messages[start:end] = sorted(results, key=lambda result: order[result["tool_call_id"]])
    return messages


def merge_system_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """For templates that take one system message, first: the leading ones become one, later ones user messages."""
    leading = 0
    while leading < len(messages) and messages[leading]["role"] == "system":
        leading += 1
    merged: list[dict[str, Any]] = []
    if leading:
        text = "\n\n".join(filter(None, (content_text(message) for message in messages[:leading])))
        merged.append({**messages[0], "content": text})
    merged += ({**message, "role": "user"} if message["role"] == "system" else dict(message) for message in messages[leading:])
    return merged


def content_text(message: Message) -> str:
    """The text of a message's content, parts joined."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def parse_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with arguments of calls that are JSON text parsed: templates iterate over a mapping. Text that is not a JSON object, as
    models write it and clients send it back, becomes a call without arguments."""
    return [_with_parsed(message) if message.get("tool_calls") else message for message in messages]


def _with_parsed(message: Message) -> dict[str, Any]:
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        if isinstance(function.get("arguments", {}), Mapping):
            calls.append(call)
        elif "function" in call:
            calls.append({**call, "function": {**function, "arguments": _object(function["arguments"])}})
        else:
            calls.append({**call, "arguments": _object(function["arguments"])})
    return {**message, "tool_calls": calls}


def _object(arguments: Any) -> dict[str, Any]:
    try:
        value = json.loads(arguments)
    except (TypeError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
