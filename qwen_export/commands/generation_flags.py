"""The options of commands that make an answer: how tokens are chosen, and what the chat template is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from qwen_export.commands.param_types import Finite, KeyValue

Command = Callable[..., Any]

_SAMPLING = (
    click.option("--temperature", type=Finite(), help="Default: what the model card recommends for the mode, as for the next ones."),
    click.option("--top-p", type=Finite()),
    click.option("--top-k", type=int),
    click.option("--min-p", type=Finite()),
    click.option("--presence-penalty", type=Finite(), help="Lowers tokens that the answer has, -2 to 2."),
    click.option("--frequency-penalty", type=Finite(), help="The same for each time that it has them, -2 to 2."),
    click.option("--repetition-penalty", type=Finite(), help="Divides what prompt and answer have; 1 is off."),
    click.option("--seed", type=int, help="The same seed gives the same text."),
    click.option("--greedy", is_flag=True, default=None, help="Always the likeliest token."),
)
_SAMPLING_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "greedy",
)


def sampling_options(command: Command) -> Command:
    """How tokens are chosen, as `sampling`: the fields of SamplingParams that were given."""
    return gathered(command, "sampling", _SAMPLING, _SAMPLING_NAMES)


def template_options(note: str = "") -> Callable[[Command], Command]:
    """What the chat template is given, as `template`: arguments of `Model.stream`, and `system`. `note` is added to each help."""

    def helps(text: str) -> str:
        return f"{text} {note}".strip()

    options = (
        click.option("--system", help=helps("System message.")),
        click.option("--thinking/--no-thinking", "enable_thinking", default=None, help=helps("Overrides the template's default.")),
        click.option(
            "--preserve-thinking",
            is_flag=True,
            default=None,
            help=helps("Keep past reasoning in the prompt, where the template can."),
        ),
        click.option(
            "--template-kwarg",
            "template_kwargs",
            type=KeyValue(),
            multiple=True,
            help=helps("A variable of the chat template; repeatable."),
        ),
    )

    def decorate(command: Command) -> Command:
        @wraps(command)
        def called(*arguments: Any, template: dict[str, Any], **values: Any) -> Any:
            if "template_kwargs" in template:
                template["template_kwargs"] = dict(template["template_kwargs"])
            return command(*arguments, template=template, **values)

        return gathered(called, "template", options, ("system", "enable_thinking", "preserve_thinking", "template_kwargs"))

    return decorate


def gathered(command: Command, name: str, options: tuple[Any, ...], members: tuple[str, ...]) -> Command:
    """The command with the options, whose given values reach it as the one argument `name`."""

    @wraps(command)
    def called(*arguments: Any, **values: Any) -> Any:
        taken = {member: values.pop(member) for member in members}
        given = {member: value for member, value in taken.items() if value is not None and value != ()}
        return command(*arguments, **values, **{name: given})

    for option in reversed(options):
        called = option(called)
    return called
