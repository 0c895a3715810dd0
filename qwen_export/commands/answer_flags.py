"""The options of `run` about the answer itself: what it must be, what ends it, and what is wanted beside its text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_export.commands.param_types import Finite
from qwen_export.commands.prompt_source import read_text
from qwen_export.errors import ParameterError

if TYPE_CHECKING:
    from qwen_export.runtimes.structured.answer_options import AnswerForm, AnswerOptions

_FILE = click.Path(path_type=Path)


class _Bias(click.ParamType):
    """ID=BIAS."""

    name = "ID=BIAS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, bias = str(value).partition("=")
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            self.fail(f"{value!r} is not ID=BIAS, such as 151=-100", param, ctx)
        return int(token), Finite().convert(bias, param, ctx)


_OPTIONS = (
    click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer, and is not part of it; repeatable."),
    click.option("--include-stop", is_flag=True, help="The stop text stays in the answer."),
    click.option("--stop-token-id", "stop_token_ids", type=int, multiple=True, help="A token that ends the answer; repeatable."),
    click.option("--ignore-eos", is_flag=True, help="The model's own stop tokens do not end the answer."),
    click.option("--min-new-tokens", type=int, default=0, metavar="N", help="Nothing ends the answer before."),
    click.option("--logit-bias", type=_Bias(), multiple=True, help="Added to the logit of a token, -100 to 100; repeatable."),
    click.option("--tools", type=_FILE, metavar="FILE.json", help="Functions that the model may call, as in a chat request."),
    click.option("--tool-choice", default="auto", metavar="auto|none|required|NAME", help="Which of them it must call."),
    click.option("--json-object", is_flag=True, help="The answer is a JSON object."),
    click.option("--json-schema", type=_FILE, metavar="FILE.json", help="The answer is JSON of this schema."),
    click.option("--regex", metavar="PATTERN", help="The whole answer matches it."),
    click.option("--choice", multiple=True, metavar="TEXT", help="The answer is one of these; repeatable."),
    click.option("--grammar", type=_FILE, metavar="FILE.lark", help="The answer is of this grammar."),
    click.option("--thinking-budget", type=int, metavar="N", help="Tokens of reasoning, after which it is closed."),
    click.option("--logprobs", type=int, metavar="K", help="With --json: log probabilities of the tokens and of the K likeliest."),
)
_NAMES = [
    "stop",
    "include_stop",
    "stop_token_ids",
    "ignore_eos",
    "min_new_tokens",
    "logit_bias",
    "tools",
    "tool_choice",
    "json_object",
    "json_schema",
    "regex",
    "choice",
    "grammar",
    "thinking_budget",
    "logprobs",
]


@dataclass
class AnswerFlags:
    """The values of the options; `tools` and `options` are what `Model.stream` takes."""

    given: dict[str, Any]

    @property
    def stop(self) -> list[str] | None:
        return list(self.given["stop"]) or None

    @property
    def logprobs(self) -> bool:
        return self.given["logprobs"] is not None

    @property
    def needs_chat(self) -> bool:
        """Whether an option has a meaning through the chat template only."""
        return self.given["tools"] is not None or self.given["thinking_budget"] is not None

    def tools(self) -> list[dict[str, Any]] | None:
        """The functions of the file. Raises ParameterError."""
        if self.given["tools"] is None:
            return None
        tools = _read_json(self.given["tools"], "tools")
        if isinstance(tools, dict):
            tools = tools.get("tools")
        if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
            raise ParameterError(
                "the file holds no list of functions",
                parameter="tools",
                where=str(self.given["tools"]),
                expected="a JSON list of objects",
                fix='Write {"type": "function", "function": {"name": ..., "parameters": ...}} for each function.',
            )
        return tools

    def options(self) -> AnswerOptions:
        """Raises ParameterError for a value that is not usable."""
        from qwen_export.runtimes.structured.answer_options import AnswerOptions, ToolName

        choice = self.given["tool_choice"]
        names = ("thinking_budget", "logprobs", "stop_token_ids", "include_stop", "ignore_eos", "min_new_tokens")
        return AnswerOptions(
            form=self._form(),
            tool_choice=choice if choice in ("auto", "none", "required") else ToolName(choice),
            logit_bias=dict(self.given["logit_bias"]),
            **{name: self.given[name] for name in names},
        )

    def _form(self) -> AnswerForm | None:
        from qwen_export.runtimes.structured.answer_options import AnswerForm

        given = {name: self.given[name] for name in ("json_object", "json_schema", "regex", "choice", "grammar") if self.given[name]}
        if not given:
            return None
        if len(given) > 1:
            raise click.UsageError("give one of --json-object, --json-schema, --regex, --choice and --grammar")
        if "json_schema" in given:
            return AnswerForm("json_schema", _read_json(given["json_schema"], "json_schema"))
        if "grammar" in given:
            return AnswerForm("grammar", read_text(given["grammar"], "grammar"))
        if "choice" in given:
            return AnswerForm("choice", tuple(given["choice"]))
        return AnswerForm("json_object") if "json_object" in given else AnswerForm("regex", given["regex"])


def _read_json(path: Path, parameter: str) -> Any:
    try:
        return json.loads(read_text(path, parameter))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ParameterError):
            raise
        raise ParameterError(
            "the file is not JSON", parameter=parameter, where=str(path), got=str(error), fix="Correct the file."
        ) from error


def answer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options, as `answer`: AnswerFlags."""

    @wraps(command)
    def called(*arguments: Any, **values: Any) -> Any:
        return command(*arguments, answer=AnswerFlags({name: values.pop(name) for name in _NAMES}), **values)

    for option in reversed(_OPTIONS):
        called = option(called)
    return called
