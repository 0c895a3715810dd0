"""What the body of a request in a batch file requires of its answer: fields of OpenAI's protocol, and vLLM's beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_export.errors import ParameterError
from qwen_export.runtimes.structured.answer_options import AnswerForm, AnswerOptions, ToolChoice, ToolName

_FORMS: Mapping[str, Any] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
MOST_ANSWERS = 16


def answer_options(body: Mapping[str, Any], *, chat: bool) -> AnswerOptions:
    """Raises ParameterError for values that are not usable. A field that is null is absent."""
    counts = body.get("logprobs")
    if chat:
        counts = body.get("top_logprobs", 0) if counts is True else None
        if body.get("top_logprobs") is not None and counts is None:
            raise _wrong("top_logprobs", body["top_logprobs"], "logprobs: true beside it")
    echo = not chat and body.get("echo") is True
    bias = body.get("logit_bias", {})
    try:
        bias = {int(token): value for token, value in bias.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise _wrong("logit_bias", bias, "an object of token ids and numbers") from error
    return AnswerOptions(
        form=_form(body),
        tool_choice=_tool_choice(body.get("tool_choice", "auto")) if chat and body.get("tools") else "auto",
        parallel_tool_calls=body.get("parallel_tool_calls", True),
        thinking_budget=body.get("thinking_budget", body.get("thinking_token_budget")),
        logprobs=counts,
        prompt_logprobs=counts if echo else None,
        logit_bias=bias,
        stop_token_ids=body.get("stop_token_ids", ()),
        include_stop=body.get("include_stop_str_in_output", False),
        ignore_eos=body.get("ignore_eos", False),
        min_new_tokens=body.get("min_tokens", 0),
    )


def answer_count(body: Mapping[str, Any]) -> int:
    """How many answers are wanted."""
    count = body.get("n", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_ANSWERS:
        raise _wrong("n", count, f"1 to {MOST_ANSWERS}")
    return count


def _form(body: Mapping[str, Any]) -> AnswerForm | None:
    wanted, other = body.get("response_format"), body.get("structured_outputs")
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if wanted is not None and kind not in ("text", "json_object", "json_schema"):
        raise _wrong("response_format", wanted, "an object whose type is text, json_object or json_schema")
    if kind == "json_object":
        return AnswerForm("json_object")
    if kind == "json_schema":
        inner = wanted.get("json_schema") if isinstance(wanted, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), (dict, bool)):
            raise _wrong("response_format", wanted, '{"type": "json_schema", "json_schema": {"name", "schema"}}')
        return AnswerForm("json_schema", inner["schema"])
    if other is None:
        return None
    given = [name for name in _FORMS if other.get(name) is not None] if isinstance(other, Mapping) else []
    if len(given) != 1:
        raise _wrong("structured_outputs", other, f"an object with one of {', '.join(_FORMS)}")
    return AnswerForm(_FORMS[given[0]], other[given[0]])


def _tool_choice(value: Any) -> ToolChoice:
    if isinstance(value, Mapping):
        function = value.get("function", value)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            return ToolName(name)
    elif value in ("auto", "none", "required"):
        choice: ToolChoice = value
        return choice
    raise _wrong("tool_choice", value, 'auto, none, required or {"type": "function", "function": {"name"}}')


def _wrong(name: str, value: Any, expected: str) -> ParameterError:
    return ParameterError(
        "the value of the field is not usable", parameter=name, got=repr(value)[:80], expected=expected, fix="Correct it."
    )
