"""The body of /v1/chat/completions, as a request to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from qwen_export.runtimes.server.ask import Ask
from qwen_export.runtimes.server.sampling_body import SamplingBody, wrong
from qwen_export.runtimes.server.wire_errors import HttpError
from qwen_export.runtimes.structured.answer_options import AnswerOptions, ToolChoice, ToolName

MOST_LOGPROBS = 20
_CHOICES: dict[str, ToolChoice] = {"auto": "auto", "none": "none", "required": "required"}
SWITCHES = ("enable_thinking", "preserve_thinking")


class ChatBody(SamplingBody):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_budget: int | None = None
    thinking_token_budget: int | None = None
    continue_final_message: bool | None = None


def chat_ask(body: ChatBody) -> Ask:
    """Raises HttpError and ParameterError for fields that cannot be used."""
    body.check_shared()
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if limit is not None and limit < 1:
        raise wrong("max_completion_tokens", limit, "at least 1")
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise HttpError("top_logprobs needs logprobs", code="invalid_value", field="top_logprobs", fix="Set logprobs.")
        if not 0 <= body.top_logprobs <= MOST_LOGPROBS:
            raise wrong("top_logprobs", body.top_logprobs, f"0 to {MOST_LOGPROBS}")
    options = AnswerOptions(
        **body.answer_options(),
        tool_choice=tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        thinking_budget=body.thinking_budget if body.thinking_token_budget is None else body.thinking_token_budget,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    options.check_tools(function_names(body.tools))
    variables = dict(body.chat_template_kwargs)
    switches = {name: variables.pop(name, getattr(body, name)) for name in SWITCHES}
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    if variables.get("reasoning_effort") == "none" and switches["enable_thinking"] is None:
        del variables["reasoning_effort"]
        switches["enable_thinking"] = False
    return Ask(
        messages=[with_content(message) for message in body.messages],
        tools=body.tools or None,
        template={**switches, "continue_final_message": body.continue_final_message},
        variables=variables,
        sampling=body.sampling(),
        max_tokens=limit,
        stop=body.stops,
        n=body.n,
        options=options,
    )


def tool_choice(given: str | Mapping[str, Any] | None) -> ToolChoice:
    """The choice in the form of chat completions, or of responses, where the name is not inside `function`."""
    if given is None:
        return "auto"
    if isinstance(given, str) and given in _CHOICES:
        return _CHOICES[given]
    if isinstance(given, Mapping):
        function = given.get("function", given)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            return ToolName(name)
    raise wrong("tool_choice", repr(given)[:100], 'auto, none, required or {"type": "function", "function": {"name": NAME}}')


def function_names(tools: list[dict[str, Any]]) -> list[str]:
    """Raises HttpError for what is no function."""
    names = []
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise HttpError(
                "a tool cannot be read",
                code="invalid_value",
                field=f"tools.{i}",
                expected='{"type": "function", "function": {"name", "description", "parameters"}}',
                fix="Give functions only.",
            )
        names.append(function["name"])
    return names


def with_content(message: dict[str, Any]) -> dict[str, Any]:
    """Clients leave out what an assistant did not say."""
    return {**message, "content": None} if message.get("role") == "assistant" and "content" not in message else message
