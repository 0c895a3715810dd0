"""qwen-export run"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_export.commands.hashing import hash_with_progress
from qwen_export.commands.load_options import load_options
from qwen_export.commands.output import verbosity_options
from qwen_export.commands.param_types import Finite, KeyValue
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
@click.option("--system", help="System message (implies --chat).")
@click.option("--thinking/--no-thinking", "thinking", default=None, help="Overrides the template's default (implies --chat).")
@click.option(
    "--preserve-thinking", is_flag=True, default=None, help="Keep past reasoning in the prompt, where the template can (implies --chat)."
)
@click.option(
    "--template-kwarg",
    "template_kwarg",
    type=KeyValue(),
    multiple=True,
    help="A variable of the chat template (implies --chat); repeatable.",
)
@click.option(
    "--image",
    "images",
    type=str,
    multiple=True,
    metavar="FILE",
    help="A picture that PROMPT is about (implies --chat); repeatable, in this order.",
)
@click.option("--max-pixels", type=int, metavar="N", help="Scale pictures down to so many pixels; 1024 of them are a token.")
@click.option("--max-new-tokens", type=int, metavar="N", help="Default: until the model stops or the context is full, both exit code 0.")
@click.option("--temperature", type=Finite())
@click.option("--top-p", type=Finite())
@click.option("--top-k", type=int)
@click.option("--min-p", type=Finite())
@click.option("--presence-penalty", type=Finite())
@click.option("--seed", type=int)
@click.option("--greedy", is_flag=True, default=None, help="Always the likeliest token.")
@click.option("--max-context", type=int, metavar="N", help="Overrides the bundle's cache capacity.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, reasoning, token ids and statistics at the end.")
@load_options()
@verbosity_options
def command(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    system: str | None,
    thinking: bool | None,
    preserve_thinking: bool | None,
    template_kwarg: tuple[tuple[str, Any], ...],
    images: tuple[str, ...],
    max_pixels: int | None,
    max_new_tokens: int | None,
    max_context: int | None,
    as_json: bool,
    loading: dict[str, Any],
    **sampling: Any,
) -> None:
    """Stream the BUNDLE's continuation of PROMPT, or its answer with --chat. PROMPT `-` is stdin, `@FILE` a file."""
    text = read_prompt(prompt, prompt_file)
    with needed_for("run"):
        from qwen_export.runtimes.model import load
        from qwen_export.runtimes.vision.chat_media import MediaOptions
    hash_with_progress(bundle)
    model = load(bundle, max_context=max_context, **loading)
    given = {name: value for name, value in sampling.items() if value is not None}
    chats = chat or bool(template_kwarg or images) or any(option is not None for option in (system, thinking, preserve_thinking))
    with ExitStack() as stack:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": stack.enter_context(prompt_progress())}
        if template_kwarg:
            options["template_kwargs"] = dict(template_kwarg)
        if chats:
            if max_pixels is not None:
                options["media"] = MediaOptions(max_pixels=max_pixels)
            pictures = [{"type": "image", "image": image} for image in images]
            content = [*pictures, {"type": "text", "text": text}] if pictures else text
            generation = _answer(model, content, system, thinking, preserve_thinking, given, options)
        else:
            generation = model.complete(text, sampling=dataclasses.replace(model.recommended(False), **given), **options)

        def events() -> Iterator[Any]:
            with stack:  # the progress of the prompt ends before the first token is printed
                started = read_prompt_first(generation)
            return started

        (print_json if as_json else print_answer)(generation, events)


def _answer(
    model: Model,
    content: str | list[dict[str, Any]],
    system: str | None,
    thinking: bool | None,
    preserve_thinking: bool | None,
    given: dict[str, Any],
    options: dict[str, Any],
) -> Generation:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": content})
    thinks = thinking if thinking is not None else model.template.thinks_by_default()
    return model.stream(
        messages,
        enable_thinking=thinking,
        preserve_thinking=preserve_thinking,
        sampling=dataclasses.replace(model.recommended(thinks), **given),
        **options,
    )
