"""What a request may require of an answer, beside how its tokens are chosen (`SamplingParams`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen_export.errors import ParameterError

FormKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]
_VALUES: Mapping[str, tuple[Any, str]] = {
    "json_object": (type(None), "no value"),
    "json_schema": ((dict, bool), "a JSON schema"),
    "regex": (str, "a regular expression"),
    "choice": (tuple, "a tuple of texts"),
    "grammar": (str, "a grammar in the Lark form of llguidance"),
}
_LARGEST_BIAS = 100.0
"""As in OpenAI's protocol: it decides a choice alone."""


@dataclass(frozen=True)
class AnswerForm:
    """The form of the text behind the reasoning. `value` by `kind`: None for "json_object" (any JSON object), a schema for "json_schema", a
    text for "regex" (the whole answer matches it) and "grammar" (Lark, as llguidance takes it), texts for "choice" (one of them). With
    `strict` False keywords of a schema that no grammar here can hold are left out; otherwise such a schema is an error.

    Raises ParameterError for a value of another type."""

    kind: FormKind
    value: Any = None
    strict: bool = True

    def __post_init__(self) -> None:
        if self.kind not in _VALUES:
            raise _unusable("form", f"kind {self.kind!r}", f"one of {', '.join(_VALUES)}")
        if self.kind == "choice" and isinstance(self.value, list):
            object.__setattr__(self, "value", tuple(self.value))
        kinds, expected = _VALUES[self.kind]
        if not isinstance(self.value, kinds):
            raise _unusable("form", f"{type(self.value).__name__} for {self.kind}", expected)
        if self.kind == "choice" and not (self.value and all(isinstance(text, str) and text for text in self.value)):
            raise _unusable("form", repr(self.value)[:80], "one text or more, none of them empty")


@dataclass(frozen=True)
class ToolName:
    """The tool that an answer must call."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | ToolName


@dataclass(frozen=True)
class AnswerOptions:
    """`form`: what the text behind the reasoning must be.

    `tool_choice`: "auto" leaves it to the model whether it calls a tool, "none" lets it call none, "required" makes it call one or more,
    and a `ToolName` that one. Without `parallel_tool_calls` an answer ends behind its first call. `thinking_budget`: tokens of reasoning,
    after which it is closed; None is no limit.

    `logprobs` k: each token comes with its log probability and those of the k likeliest; they are the model's, before bias, penalties,
    temperature and constraints. `prompt_logprobs` the same for the tokens of the prompt. `logit_bias`: added to the logits of these
    tokens, -100 to 100. `stop_token_ids` end an answer as the model's own stop tokens do, which `ignore_eos` switches off. With
    `include_stop` a stop string stays in the text. No stop token or stop string ends an answer before `min_new_tokens` tokens.

    Raises ParameterError for a value that is not usable."""

    form: AnswerForm | None = None
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    thinking_budget: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.form is not None and not isinstance(self.form, AnswerForm):
            raise _unusable("form", type(self.form).__name__, "an AnswerForm or None")
        if not isinstance(self.tool_choice, ToolName) and self.tool_choice not in ("auto", "none", "required"):
            raise _unusable("tool_choice", repr(self.tool_choice), "auto, none, required or a ToolName")
        for name in ("parallel_tool_calls", "include_stop", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise _unusable(name, repr(getattr(self, name)), "True or False")
        for name in ("thinking_budget", "logprobs", "prompt_logprobs", "min_new_tokens"):
            value = getattr(self, name)
            if not (_is_count(value) or (value is None and name != "min_new_tokens")):
                raise _unusable(name, repr(value), "an integer >= 0")
        if isinstance(self.stop_token_ids, (str, bytes)) or not all(map(_is_count, self.stop_token_ids)):
            raise _unusable("stop_token_ids", repr(self.stop_token_ids), "a sequence of token ids")
        if not isinstance(self.logit_bias, Mapping) or not all(map(_is_bias, self.logit_bias.items())):
            raise _unusable("logit_bias", repr(self.logit_bias)[:200], "a mapping from token ids to numbers from -100 to 100")

    def check_tools(self, names: Sequence[str]) -> None:
        """Raises ParameterError where `tool_choice` needs a tool that is not among those of the request."""
        if self.tool_choice == "required" and not names:
            raise ParameterError("there are no tools to call", parameter="tool_choice", got="required", fix="Give {tools}.")
        if isinstance(self.tool_choice, ToolName) and self.tool_choice.name not in names:
            raise ParameterError(
                "the tool to call is not one of the request",
                parameter="tool_choice",
                got=repr(self.tool_choice.name),
                expected=", ".join(names) or "a tool of the request, which has none",
                fix="Name one of {tools}.",
            )

    def check_ids(self, vocabulary: int) -> None:
        """Raises ParameterError for a token id that a tokenizer of so many tokens does not have."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            wrong = next((token for token in ids if token >= vocabulary), None)
            if wrong is not None:
                raise ParameterError(
                    "a token id is not in the vocabulary",
                    parameter=name,
                    got=wrong,
                    expected=f"0 to {vocabulary - 1}",
                    fix="Take ids of the tokenizer of the bundle.",
                )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_bias(pair: tuple[Any, Any]) -> bool:
    token, bias = pair
    number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
    return _is_count(token) and number and math.isfinite(bias) and abs(bias) <= _LARGEST_BIAS


def _unusable(name: str, got: str, expected: str) -> ParameterError:
    return ParameterError(f"the value of {{{name}}} is not usable", parameter=name, got=got, expected=expected, fix=f"Give {expected}.")
