"""Fields that chat completions and completions share: sampling, limits, forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from qwen_export.errors import ParameterError
from qwen_export.runtimes.server.request_body import AnswerBody, Body
from qwen_export.runtimes.server.wire_errors import HttpError
from qwen_export.runtimes.structured.answer_options import AnswerForm, FormKind

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")
MOST_CHOICES, MOST_STOPS = 16, 16
_SEEDS = 1 << 63
_GONE = {
    "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs",
    "guided_choice": "structured_outputs",
    "guided_grammar": "structured_outputs",
    "functions": "tools",
    "function_call": "tool_choice",
    "best_of": "n",
    "use_beam_search": "n",
}
"""Fields that would change the answer, and what takes their place: to ignore them would be a wrong answer."""


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(AnswerBody):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int = 1
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_gone(cls, fields: Any) -> Any:
        for name, instead in _GONE.items():
            if fields.get(name) not in (None, False, 1):
                raise HttpError(f"the field {name} is not supported", code="unsupported_field", field=name, fix=f"Use {instead} instead.")
        return fields

    @property
    def least_tokens(self) -> int:
        return 1

    def check_shared(self) -> None:
        if not 1 <= self.n <= MOST_CHOICES:
            raise wrong("n", self.n, f"1 to {MOST_CHOICES}")
        if self.max_tokens is not None and self.max_tokens < self.least_tokens:
            raise wrong("max_tokens", self.max_tokens, f"at least {self.least_tokens}")
        if len(self.stops or ()) > MOST_STOPS:
            raise wrong("stop", f"{len(self.stops or ())} texts", f"at most {MOST_STOPS}")
        if self.stream_options is not None and not self.stream:
            raise HttpError(
                "an answer that is no stream has no options of one",
                code="invalid_value",
                field="stream_options",
                fix="Set stream, or leave stream_options out.",
            )

    @property
    def stops(self) -> list[str] | None:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self) -> dict[str, Any]:
        """The values that are given, for `SamplingParams`."""
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if "temperature" in given:
            given["greedy"] = False
        if given.get("top_k") == -1:  # off, as other servers have it
            given["top_k"] = 0
        if "seed" in given:
            given["seed"] %= _SEEDS
        return given

    def answer_options(self) -> dict[str, Any]:
        """Fields of `AnswerOptions`."""
        return {
            "form": answer_form(self.response_format, self.structured_outputs),
            "logit_bias": self.logit_bias,
            "stop_token_ids": self.stop_token_ids,
            "include_stop": self.include_stop_str_in_output,
            "ignore_eos": self.ignore_eos,
            "min_new_tokens": self.min_tokens,
        }


def answer_form(response_format: Mapping[str, Any] | None, structured: Mapping[str, Any] | None) -> AnswerForm | None:
    """The form that one of the two fields asks for."""
    wanted = structured_form(structured) if structured else None
    kind = (response_format or {}).get("type", "text")
    if kind == "text":
        return wanted
    if wanted is not None:
        raise HttpError(
            "two forms are asked for", code="invalid_value", field="structured_outputs", fix="Leave response_format or this field out."
        )
    if kind == "json_object":
        return AnswerForm("json_object")
    if kind != "json_schema":
        raise wrong("response_format", kind, "text, json_object or json_schema")
    inner = (response_format or {}).get("json_schema", response_format)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, (dict, bool)):
        raise HttpError(
            "the schema is missing",
            code="invalid_value",
            field="response_format",
            expected='{"type": "json_schema", "json_schema": {"name", "schema"}}',
            fix="Give json_schema.schema.",
        )
    return AnswerForm("json_schema", schema)


def structured_form(fields: Mapping[str, Any]) -> AnswerForm | None:
    kinds: dict[str, FormKind] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
    given = [name for name in (*kinds, "json_object") if fields.get(name) not in (None, False)]
    if len(given) > 1:
        raise wrong("structured_outputs", ", ".join(given), "one of json, regex, choice, grammar and json_object")
    if not given:
        return None
    if given == ["json_object"]:
        return AnswerForm("json_object")
    try:
        return AnswerForm(kinds[given[0]], fields[given[0]])
    except ParameterError as error:
        raise wrong("structured_outputs", error.got, error.expected) from error


def wrong(field: str, got: object, expected: str) -> HttpError:
    """A field with a value that it cannot have."""
    return HttpError(
        f"the value of {field} is out of range", code="invalid_value", field=field, got=got, expected=expected, fix=f"Give {expected}."
    )
