"""Chat messages to a prompt, through the Jinja template that the checkpoint ships.

The environment is the one that `transformers` renders chat templates in: `trim_blocks`, `lstrip_blocks`, loop controls, the `generation`
tag, `raise_exception`, `strftime_now`, and a `tojson` that does not escape HTML. It is sandboxed: a template can neither reach Python
internals nor change the messages.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_export.errors import TemplateError
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer

Message = Mapping[str, Any]


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; for rendering it is a plain scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class ChatTemplate:
    """A compiled chat template.

    `source` is the Jinja text; `special_tokens` are variables of it, as tokenizer_config.json names them (`eos_token`, `pad_token`, ...).
    Raises TemplateError when `source` is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            raise TemplateError(
                "The chat template is not valid Jinja", where=f"line {line}" if line else "", got=error, fix="Use the checkpoint's own"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        preserve_thinking: bool | None = None,
        **variables: Any,
    ) -> str:
        """The prompt.

        `messages`: `{"role", "content"[, "reasoning_content", "tool_calls"]}` each; `content` is a string, a list of parts
        (`{"type": "text", "text": …}`, images, videos) or None. `tools`: JSON schemas of functions.
        `enable_thinking`, `preserve_thinking`: None leaves the variable undefined, so that the template's own default rules (thinking is
        on by default from 4B upwards, off for 0.8B and 2B). `variables` are passed on, for what only some templates know
        (`reasoning_effort`, `add_vision_id`).

        Raises TemplateError, with the template's own sentence when it refuses the messages.
        """
        check_messages(messages)
        optional = {"enable_thinking": enable_thinking, "preserve_thinking": preserve_thinking}
        given = {name: value for name, value in optional.items() if value is not None}
        try:
            return self._template.render(
                **self.special_tokens | given | variables,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # foreign code: besides jinja2's own errors any Python error of an expression
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise TemplateError("The chat template refused the messages", got=reason, fix=_FIX) from error

    def thinks_by_default(self) -> bool:
        """Whether an answer starts inside a `<think>` block when `enable_thinking` is not given."""
        return thinking_prefix(self.render([{"role": "user", "content": "?"}]))


_FIX = "Change the messages so that they follow the template (one system message first, at least one user message)"


def thinking_prefix(rendered_prompt: str) -> bool:
    """Whether the prompt ends inside an open `<think>` block, so that the model's first token is reasoning.

    Read off the prompt and not off the model's name: templates of one generation differ in their default.
    """
    turn = rendered_prompt[rendered_prompt.rfind("<|im_start|>") + 1 :]
    return "<|im_end|>" not in turn and turn.rfind("<think>") > turn.rfind("</think>")


def check_messages(messages: Sequence[Message]) -> None:
    """Raise TemplateError for what is not a list of messages; whether roles and their order fit is the template's to say."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise _bad_message("", "messages", type(messages).__name__, "a list of messages")
    if not messages:
        raise _bad_message("", "messages", "an empty list", "at least one message")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise _bad_message(where, "message", type(message).__name__, "a mapping with 'role' and 'content'")
        if not isinstance(message.get("role"), str):
            raise _bad_message(where, "role", repr(message.get("role")), "a string such as 'user'")
        _check_content(where, message)
        reasoning = message.get("reasoning_content")
        if reasoning is not None and not isinstance(reasoning, str):
            raise _bad_message(where, "reasoning_content", type(reasoning).__name__, "a string")
        _check_tool_calls(where, message.get("tool_calls"))


def _check_content(where: str, message: Message) -> None:
    content = message.get("content")
    if "content" not in message and not message.get("tool_calls"):
        raise _bad_message(where, "content", "nothing", "a string")
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise _bad_message(where, "content", type(content).__name__, 'a string or a list of parts like {"type": "text", "text": …}')


def _check_tool_calls(where: str, calls: object) -> None:
    if calls is None:
        return
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise _bad_message(where, "tool_calls", type(calls).__name__, "a list of mappings")
    for i, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _bad_message(f"{where}.tool_calls[{i}]", "tool call", repr(call), "a function with a name")


def _bad_message(where: str, field: str, got: str, expected: str) -> TemplateError:
    return TemplateError(f"The {field} cannot be rendered", where=where, got=got, expected=expected)


def shield_messages(
    messages: Sequence[Message], tokenizer: TextTokenizer, roles: frozenset[str] = frozenset({"user", "tool"})
) -> list[dict[str, Any]]:
    """A copy of the messages in which control tokens inside the text of `roles` are plain text to `tokenizer.encode`.

    System and assistant messages are left alone: the first is the operator's, the second holds what the model itself wrote.
    """
    shielded: list[dict[str, Any]] = []
    for message in messages:
        safe = copy.deepcopy(dict(message))
        if safe.get("role") in roles:
            content = safe.get("content")
            if isinstance(content, str):
                safe["content"] = tokenizer.shield(content)
            elif isinstance(content, list):
                for part in content:
                    if isinstance(part.get("text"), str):
                        part["text"] = tokenizer.shield(part["text"])
        shielded.append(safe)
    return shielded
