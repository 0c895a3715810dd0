"""A chat as the caller gives it to the token ids that the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from qwen_export.errors import ParameterError, TemplateError
from qwen_export.runtimes.text.chat_messages import Message, check_tools, content_text, merge_system_messages, normalize_messages
from qwen_export.runtimes.text.chat_template import ChatTemplate, thinking_prefix
from qwen_export.runtimes.text.media_parts import MediaPart, take_media
from qwen_export.runtimes.text.shielding import shield_messages, shield_values
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer

# Names of `render` that are no variables of a template.
_RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message")


class TemplateOptions(TypedDict, total=False):
    """How a chat is rendered; see `Model.stream`."""

    enable_thinking: bool | None
    preserve_thinking: bool | None
    continue_final_message: bool | str | None
    template_kwargs: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """`mark_at`: tokens that the next turn's prompt will begin with, None if unknown. `thinking`: the answer starts as reasoning. `media`:
    pictures and videos, each of which is one placeholder token in `ids`, in the same order."""

    ids: list[int]
    mark_at: int | None
    thinking: bool
    media: tuple[MediaPart, ...] = ()


def chat_prompt(
    messages: Sequence[Message],
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    preserve_thinking: bool | None = None,
    continue_final_message: bool | str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    sees: bool = False,
) -> ChatPrompt:
    """The prompt of a chat; for the parameters see `Model.stream`. `sees`: messages may have pictures. Raises ParameterError
    and TemplateError."""
    check_tools(tools)
    variables = _variables(template, template_kwargs, enable_thinking=enable_thinking, preserve_thinking=preserve_thinking)
    variables = shield_values(variables, tokenizer)
    normal = normalize_messages(messages, template.source, sees=sees)
    media = tuple(take_media(normal))
    safe = shield_messages(normal, tokenizer)
    safe_tools = None if tools is None else shield_values(list(tools), tokenizer)
    carry_on = _continued(normal, continue_final_message)
    if carry_on:
        prompt, read = _render(template, safe, safe_tools, variables, continue_final_message=carry_on)
        before = read[:-1]
    else:
        prompt, before = _render(template, safe, safe_tools, variables)
    ids = tokenizer.encode(prompt, parameter="messages")
    return ChatPrompt(ids, _mark(prompt, ids, before, template, tokenizer, safe_tools, variables), thinking_prefix(prompt), media)


def _render(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: Any, variables: Mapping[str, Any], **options: Any
) -> tuple[str, list[dict[str, Any]]]:
    """The rendered messages, and the messages that were rendered: those as given or, where the template refuses or drops a system message
    that is not first, with such messages as `merge_system_messages` puts them."""
    late = [content_text(message).strip() for message in messages[1:] if message["role"] == "system"]
    try:
        prompt = template.render(messages, tools, **options, **variables)
        if all(text in prompt for text in late):
            return prompt, messages
    except TemplateError:
        if not late:
            raise
    merged = merge_system_messages(messages)
    return template.render(merged, tools, **options, **variables), merged


def _mark(
    prompt: str,
    ids: list[int],
    before: list[dict[str, Any]],
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    tools: Any,
    variables: Mapping[str, Any],
) -> int | None:
    """Tokens of the prompt that hold `before` and nothing of the answer."""
    try:
        history = template.render(before, tools, add_generation_prompt=False, **variables) if before else ""
    except TemplateError:  # without the message that is continued there may be no chat
        return None
    past = tokenizer.encode(history) if history and prompt.startswith(history) else []
    return len(past) if past and ids[: len(past)] == past else None


def _variables(template: ChatTemplate, given: Mapping[str, Any] | None, **named: bool | None) -> dict[str, Any]:
    """Template variables from parameters of their own and from {template_kwargs}."""
    for name, value in named.items():
        if value is not None and not isinstance(value, bool):
            raise ParameterError(
                "a switch of the template is neither on nor off",
                parameter=name,
                got=repr(value),
                expected="True, False or None",
                fix="Give True, False or None.",
            )
    if given is not None and (not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given)):
        raise ParameterError(
            "the template variables cannot be read",
            parameter="template_kwargs",
            got=type(given).__name__,
            expected="a mapping from names to values",
            fix='Give a mapping such as {"reasoning_effort": "low"}.',
        )
    variables = {name: value for name, value in named.items() if value is not None}
    for name, value in (given or {}).items():
        if name in _RESERVED or name in variables:
            raise ParameterError(
                "a template variable is given twice",
                parameter="template_kwargs",
                got=name,
                fix=f"Remove {name} from {{template_kwargs}}; it is a parameter of its own.",
            )
        # The two switches are the same for all templates; any other name that this one does not read would have no effect.
        if name not in template.variables and name not in named:
            known = sorted(template.variables - {*_RESERVED, *template.special_tokens, "raise_exception", "strftime_now"})
            raise ParameterError(
                "the chat template does not know this variable",
                parameter="template_kwargs",
                got=name,
                expected=", ".join(known) or "none",
                fix=f"Remove {name} from {{template_kwargs}}.",
            )
        variables[name] = value
    return variables


def _continued(messages: Sequence[Message], wanted: bool | str | None) -> bool | str:
    """Whether the answer goes on behind the last message, and in which field."""
    last = messages[-1]
    unfinished = last["role"] == "assistant" and not last.get("tool_calls")
    if wanted is None and unfinished:
        return True
    if wanted and last["role"] != "assistant":
        raise ParameterError(
            "the last message is not the assistant's",
            parameter="continue_final_message",
            got=last["role"],
            expected="assistant",
            fix="Leave {continue_final_message} out, or put the beginning of the answer last.",
        )
    if last["role"] == "assistant" and not wanted:
        raise ParameterError(
            "the last message is the assistant's, and there is nothing to answer",
            parameter="messages",
            where=f"messages[{len(messages) - 1}]",
            got="assistant, with tool calls" if last.get("tool_calls") else "assistant",
            expected="user or tool",
            fix="Add the tool results or a user message"
            + (", or continue the message with {continue_final_message}=True." if unfinished else "."),
        )
    return wanted or False
