"""Chat messages to a prompt, through the Jinja template that the checkpoint ships.

The environment is the one that `transformers` renders chat templates in: `trim_blocks`, `lstrip_blocks`, loop controls, the `generation`
tag, `raise_exception`, `strftime_now`, and a `tojson` that does not escape HTML. It is sandboxed: a template can neither reach Python
internals nor change the messages, and has limits of time and memory (`template_limits.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.parser import Parser

from qwen_export.errors import TemplateError
from qwen_export.runtimes.text.chat_messages import Message, check_messages, parse_arguments
from qwen_export.runtimes.text.template_limits import MAX_CHARS, LimitedEnvironment, LimitReached, limited_render

DEFAULT, TOOL_USE = "default", "tool_use"
"""Names in a set of templates: the one that is used, and the one that is used instead when tools are given."""

MAX_SOURCE = 1 << 20
"""Characters of a template's source; those of the family have 8,000."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; for rendering it is a plain scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces, length = [], 0
    for piece in encoder.iterencode(value):
        length += len(piece)
        if length > MAX_CHARS:
            raise LimitReached("JSON that is too large")
        pieces.append(piece)
    return "".join(pieces)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Compiled:
    """One template. Raises TemplateError when `source` is not valid Jinja."""

    def __init__(self, environment: LimitedEnvironment, source: str, name: str) -> None:
        where = "" if name == DEFAULT else f"template {name}"
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                "the chat template is too long",
                where=where,
                got=f"{len(source)} characters",
                expected=f"at most {MAX_SOURCE}",
                fix="Use the checkpoint's own chat template.",
            )
        try:
            self.jinja = environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        except Exception as error:  # besides jinja2's own errors those of Python's compiler, which gets what Jinja made
            line = getattr(error, "lineno", None)
            raise TemplateError(
                "the chat template is not valid Jinja",
                where=", ".join(filter(None, (where, f"line {line}" if line else ""))),
                got=_reason(error),
                fix="Use the checkpoint's own chat template.",
            ) from error
        self.source = source
        # Templates of other families write arguments that are text as they are.
        self.takes_argument_text = re.search(r"arguments\s+is\s+(not\s+)?string", source) is not None


class ChatTemplate:
    """A compiled chat template, or a set of named ones.

    `source`: the Jinja text, or texts by name; of a set `default` is used, and `tool_use`, if there is one, where tools are given.
    `special_tokens` are variables, as tokenizer_config.json names them (`eos_token`, `pad_token`, ...).
    Raises TemplateError when a template is not valid Jinja.
    """

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        environment = _environment()
        sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        self._compiled = {name: _Compiled(environment, text, name) for name, text in sources.items()}
        self.special_tokens = dict(special_tokens or {})
        self.source = "\n".join(sources.values())
        """The text of all templates."""
        main = self._compiled.get(DEFAULT)
        self.variables = main.variables if main is not None else frozenset[str]().union(*(c.variables for c in self._compiled.values()))
        """Names that the template reads and does not define: what can be given to `render`."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        enable_thinking: bool | None = None,
        preserve_thinking: bool | None = None,
        **variables: Any,
    ) -> str:
        """The prompt.

        `messages`: `{"role", "content"[, "reasoning_content", "tool_calls"]}` each; `content` is a string, a list of parts
        (`{"type": "text", "text": …}`, images, videos) or None. `tools`: JSON schemas of functions.
        `continue_final_message`: the prompt ends inside the last message, behind its content or behind the field that is named.
        `enable_thinking`, `preserve_thinking`: None leaves the variable undefined, so that the template's own default rules (thinking is
        on by default from 4B upwards, off for 0.8B and 2B). `variables` are passed on, for what only some templates know
        (`reasoning_effort`, `add_vision_id`).

        Raises ParameterError for messages that are none, and TemplateError, with the template's own message, when it refuses them.
        """
        check_messages(messages)
        template = self._named(TOOL_USE if tools is not None and TOOL_USE in self._compiled else DEFAULT)
        if not template.takes_argument_text:
            messages = parse_arguments(messages)
        optional = {"enable_thinking": enable_thinking, "preserve_thinking": preserve_thinking}
        given = {name: value for name, value in optional.items() if value is not None} | variables
        if not continue_final_message:
            return self._render(template, messages, tools, add_generation_prompt, given)
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        marked = [*messages[:-1], _marked(messages[-1], field)]
        return _cut_at_mark(self._render(template, marked, tools, False, given))

    def _named(self, name: str) -> _Compiled:
        if name not in self._compiled:
            raise TemplateError(
                "none of the chat templates is the one to use",
                got=", ".join(sorted(self._compiled)),
                expected=DEFAULT,
                fix="Name one of the checkpoint's templates `default`, and build again.",
            )
        return self._compiled[name]

    def _render(
        self, template: _Compiled, messages: Sequence[Message], tools: Any, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        context = {"documents": None} | self.special_tokens | dict(variables)
        context |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            with limited_render():
                return template.jinja.render(context)
        except (LimitReached, RecursionError, MemoryError, OverflowError) as error:
            raise TemplateError(
                "the chat template takes too much time or memory",
                got=_reason(error),
                fix="Use the checkpoint's own chat template; it loops or makes something large.",
            ) from error
        except Exception as error:  # foreign code: besides jinja2's own errors any Python error of an expression
            raise TemplateError("the chat template refused the messages", got=_reason(error), fix=_FIX) from error

    def thinks_by_default(self) -> bool:
        """Whether an answer starts inside a `<think>` block when `enable_thinking` is not given."""
        return thinking_prefix(self.render([{"role": "user", "content": "?"}]))


_FIX = "Change the messages so that they follow the template (one system message first, at least one user message)."


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def thinking_prefix(rendered_prompt: str) -> bool:
    """Whether the prompt ends inside an open `<think>` block, so that the model's first token is reasoning.

    Read off the prompt and not off the model's name: templates of one generation differ in their default.
    """
    turn = rendered_prompt[rendered_prompt.rfind("<|im_start|>") + 1 :]
    return "<|im_end|>" not in turn and turn.rfind("<think>") > turn.rfind("</think>")


# Noncharacters, and a space that shows whether the template trims the end of a text.
_END_MARK = "\ufdd1\ufdd2"
_SPACED_MARK = _END_MARK + " "


def _marked(message: Message, field: str) -> dict[str, Any]:
    """The message with a mark at the end of one text of it."""
    value = message.get(field)
    if isinstance(value, str):
        return {**message, field: value + _SPACED_MARK}
    parts = list(value) if isinstance(value, (list, tuple)) else []
    for i in range(len(parts) - 1, -1, -1):
        if isinstance(parts[i].get("text"), str):
            parts[i] = {**parts[i], "text": parts[i]["text"] + _SPACED_MARK}
            return {**message, field: parts}
    raise TemplateError(
        "the last message has no text to continue", where=field, got=type(value).__name__, fix="Give it a text, or end with a user message."
    )


def _cut_at_mark(rendered: str) -> str:
    """What stands before the mark; without the space before it where the template trims texts, as transformers does."""
    at = rendered.rfind(_END_MARK)
    if at < 0:
        raise TemplateError(
            "the chat template drops the message that is to be continued",
            fix="End with a user message; this template cannot continue an answer.",
        )
    return rendered[:at] if rendered.startswith(_SPACED_MARK, at) else rendered[:at].rstrip()
