"""qwen-export run"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_export.commands.generation_flags import sampling_options, template_options
from qwen_export.commands.hashing import hash_with_progress
from qwen_export.commands.load_options import load_options
from qwen_export.commands.output import verbosity_options
from qwen_export.commands.print_answer import print_answer, print_json, prompt_progress, read_prompt_first
from qwen_export.commands.prompt_source import read_prompt
from qwen_export.extras import needed_for

if TYPE_CHECKING:
    from qwen_export.runtimes.model import Generation, Model


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=click.Path(path_type=Path), metavar="FILE", help="Read the prompt from a UTF-8 file instead.")
@click.option("--chat", is_flag=True, help="Ask through the chat template; otherwise PROMPT is continued as it is.")
@template_options("(implies --chat)")
@click.option("--max-new-tokens", type=int, metavar="N", help="Default: until the model stops or the context is full, both exit code 0.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer, and is not part of it; repeatable.")
@sampling_options
@click.option("--max-context", type=int, metavar="N", help="Overrides the bundle's cache capacity.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, reasoning, token ids and statistics at the end.")
@load_options()
@verbosity_options
def command(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    template: dict[str, Any],
    max_new_tokens: int | None,
    stop: tuple[str, ...],
    sampling: dict[str, Any],
    max_context: int | None,
    as_json: bool,
    loading: dict[str, Any],
) -> None:
    """Stream the BUNDLE's continuation of PROMPT, or its answer with --chat. PROMPT `-`, or none in a pipe, is stdin; `@FILE` a file.

    The answer alone is printed on stdout; its reasoning is there on a terminal, and on stderr in a pipe."""
    text = read_prompt(prompt, prompt_file)
    with needed_for("run"):
        from qwen_export.runtimes.model import load
    hash_with_progress(bundle)
    model = load(bundle, max_context=max_context, **loading)
    with ExitStack() as stack:
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "stop": list(stop) or None,
            "progress": stack.enter_context(prompt_progress()),
        }
        if chat or template:
            generation = _answer(model, text, template, sampling, options)
        else:
            generation = model.complete(text, sampling=dataclasses.replace(model.recommended(False), **sampling), **options)

        def events() -> Iterator[Any]:
            with stack:  # the progress of the prompt ends before the first token is printed
                started = read_prompt_first(generation)
            return started

        (print_json if as_json else print_answer)(generation, events)


def _answer(model: Model, prompt: str, template: dict[str, Any], sampling: dict[str, Any], options: dict[str, Any]) -> Generation:
    system = template.pop("system", None)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    thinks = template.get("enable_thinking", model.template.thinks_by_default())
    return model.stream(messages, sampling=dataclasses.replace(model.recommended(thinks), **sampling), **template, **options)
