"""The body of /v1/messages, Anthropic's protocol, as a request to the engine.

A message is a list of blocks. Results of tools are blocks of a user message, in front of its text: they become messages of their own.
Agents that did not ask for thinking must not see it, so it is switched off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from qwen_export.runtimes.server.ask import Ask
from qwen_export.runtimes.server.message_media import data_part
from qwen_export.runtimes.server.request_body import AnswerBody
from qwen_export.runtimes.server.sampling_body import wrong
from qwen_export.runtimes.server.wire_errors import HttpError
from qwen_export.runtimes.structured.answer_options import AnswerForm, AnswerOptions, ToolChoice, ToolName

_SAMPLING = ("temperature", "top_p", "top_k")


class CountBody(AnswerBody):
    """What /v1/messages/count_tokens reads."""

    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class MessagesBody(CountBody):
    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool = False


def thinks(body: CountBody) -> bool:
    """Whether the answer may show its thinking."""
    return (body.thinking or {}).get("type") in ("enabled", "adaptive")


def messages_ask(body: CountBody) -> Ask:
    """Raises HttpError and ParameterError for fields that cannot be used."""
    choice, parallel = _tool_choice(body.tool_choice)
    budget = (body.thinking or {}).get("budget_tokens")
    options = AnswerOptions(
        form=_form((body.output_config or {}).get("format")),
        tool_choice=choice,
        parallel_tool_calls=parallel,
        thinking_budget=budget if thinks(body) else None,
    )
    tools = [_tool(tool) for tool in body.tools if isinstance(tool.get("name"), str) and "input_schema" in tool]
    options.check_tools([tool["function"]["name"] for tool in tools])
    limits: dict[str, Any] = {}
    if isinstance(body, MessagesBody):
        if body.max_tokens < 1:
            raise wrong("max_tokens", body.max_tokens, "at least 1")
        sampling = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
        sampling |= {"greedy": False} if "temperature" in sampling else {}
        limits = {"sampling": sampling, "max_tokens": body.max_tokens, "stop": body.stop_sequences}
    return Ask(
        messages=[*_system(body.system), *(made for i, message in enumerate(body.messages) for made in _turn(i, message))],
        tools=tools or None,
        template={"enable_thinking": thinks(body)},
        options=options,
        **limits,
    )


def _form(wanted: Any) -> AnswerForm | None:
    if not isinstance(wanted, Mapping) or wanted.get("type") != "json_schema":
        return None
    return AnswerForm("json_schema", wanted.get("schema"))


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": tool["name"], "description": tool.get("description", ""), "parameters": tool["input_schema"]}
    if tool.get("strict"):
        function["strict"] = True
    return {"type": "function", "function": function}


def _tool_choice(given: Mapping[str, Any] | None) -> tuple[ToolChoice, bool]:
    kind = (given or {}).get("type", "auto")
    parallel = not (given or {}).get("disable_parallel_tool_use", False)
    if kind == "tool":
        return ToolName(str((given or {}).get("name"))), parallel
    choices: dict[str, ToolChoice] = {"auto": "auto", "any": "required", "none": "none"}
    if kind not in choices:
        raise wrong("tool_choice", repr(kind), "auto, any, tool or none")
    return choices[kind], parallel


def _system(system: str | Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    if not system:
        return []
    text = system if isinstance(system, str) else "\n\n".join(str(block.get("text", "")) for block in system)
    return [{"role": "system", "content": text}]


def _turn(number: int, message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The messages that one message of the request stands for."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise wrong(f"messages.{number}.role", repr(role), "user or assistant")
    if content is None or isinstance(content, str):
        yield {"role": role, "content": content}
    elif not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        raise wrong(f"messages.{number}.content", type(content).__name__, "a text or a list of blocks")
    elif role == "assistant":
        yield _assistant(content)
    else:
        results = [block for block in content if block.get("type") == "tool_result"]
        for block in results:
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _result(block.get("content"))}
        others = [_plain(block) for block in content if block.get("type") != "tool_result"]
        if others or not results:
            yield {"role": role, "content": others}


def _plain(block: Mapping[str, Any]) -> dict[str, Any]:
    """A block without hints about caching, as a part of a chat message."""
    if block.get("type") == "image":
        return data_part(block)
    return {name: value for name, value in block.items() if name not in ("cache_control", "citations")}


def _result(content: Any) -> Any:
    return [_plain(block) for block in content if isinstance(block, Mapping)] if isinstance(content, list) else content


def _assistant(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            texts.append(str(block.get("text", "")))
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":
            raise HttpError("a block cannot be read", code="invalid_value", field="messages", got=repr(kind), fix="Leave it out.")
    made: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        made["reasoning_content"] = "\n".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    return made
