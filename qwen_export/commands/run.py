"""qwen-export run"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_export.commands.answer_flags import AnswerFlags, answer_options
from qwen_export.commands.generation_flags import sampling_options, template_options
from qwen_export.commands.hashing import hash_with_progress
from qwen_export.commands.load_options import load_options
from qwen_export.commands.media_flags import media_options
from qwen_export.commands.output import verbosity_options
from qwen_export.commands.print_answer import json_answer, print_answer, prompt_progress, read_prompt_first, usage
from qwen_export.commands.prompt_source import read_prompt
from qwen_export.extras import needed_for

if TYPE_CHECKING:
    from qwen_export.runtimes.model import Generation, Model
    from qwen_export.runtimes.sampling.sampler import SamplingParams
    from qwen_export.runtimes.vision.chat_media import MediaOptions


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=click.Path(path_type=Path), metavar="FILE", help="Read the prompt from a UTF-8 file instead.")
@click.option("--chat", is_flag=True, help="Ask through the chat template; otherwise PROMPT is continued as it is.")
@template_options("(implies --chat)")
@click.option(
    "--image",
    "images",
    type=str,
    multiple=True,
    metavar="FILE",
    help="A picture that PROMPT is about (implies --chat); repeatable, in this order.",
)
@click.option("--video", "videos", multiple=True, metavar="FILE", help="A video that PROMPT is about, behind the pictures; repeatable.")
@media_options
@click.option("--max-new-tokens", type=int, metavar="N", help="Default: until the model stops or the context is full, both exit code 0.")
@sampling_options
@answer_options
@click.option("-n", "count", type=click.IntRange(1), default=1, metavar="N", help="Answers to the prompt, one after the other.")
@click.option("--max-context", type=int, metavar="N", help="Overrides the bundle's cache capacity.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object at the end: text, reasoning, tool calls, usage, token ids, statistics."
)
@load_options()
@verbosity_options
def command(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    template: dict[str, Any],
    images: tuple[str, ...],
    videos: tuple[str, ...],
    media: MediaOptions,
    max_new_tokens: int | None,
    sampling: dict[str, Any],
    answer: AnswerFlags,
    count: int,
    max_context: int | None,
    as_json: bool,
    loading: dict[str, Any],
) -> None:
    """Stream the BUNDLE's continuation of PROMPT, or its answer with --chat. PROMPT `-`, or none in a pipe, is stdin; `@FILE` a file.

    The answer alone is printed on stdout; its reasoning is there on a terminal, and on stderr in a pipe. A tool call is a line of JSON."""
    if answer.logprobs and not as_json:
        raise click.UsageError("--logprobs needs --json")
    with needed_for("run"):
        from qwen_export.runtimes.model import load

    tools, options = answer.tools(), answer.options()
    text = read_prompt(prompt, prompt_file)
    hash_with_progress(bundle)
    model = load(bundle, max_context=max_context, **loading)
    chats = chat or bool(template or images or videos) or answer.needs_chat
    messages = _messages(text, images, videos, template.pop("system", None)) if chats else []
    params = _sampling(model, sampling, template, chats)

    def generation(number: int, progress: Callable[[int, int], None]) -> Generation:
        """Answer number `number`; each has a seed of its own."""
        seeded = params if params.seed is None else dataclasses.replace(params, seed=params.seed + number)
        common: dict[str, Any] = {"sampling": seeded, "max_new_tokens": max_new_tokens, "stop": answer.stop, "answer": options}
        if chats:
            return model.stream(messages, tools=tools, progress=progress, media=media, **common, **template)
        return model.complete(text, progress=progress, **common)

    generations, results = [], []
    for number in range(count):
        with ExitStack() as stack:
            made = generation(number, stack.enter_context(prompt_progress()))
            generations.append(made)

            def events(made: Generation = made, stack: ExitStack = stack) -> Iterator[Any]:
                with stack:  # the progress of the prompt ends before the first token is printed
                    return read_prompt_first(made)

            if as_json:
                results.append(json_answer(made, events, tools or (), answer.logprobs))
            else:
                print_answer(made, events, tools or ())
    if as_json:
        result = results[0] if count == 1 else {"answers": results, "usage": usage(generations)}
        click.echo(json.dumps(result, indent=1, ensure_ascii=False))


def _messages(prompt: str, images: Sequence[str], videos: Sequence[str], system: str | None) -> list[dict[str, Any]]:
    media = [{"type": kind, kind: file} for kind, files in (("image", images), ("video", videos)) for file in files]
    content = [*media, {"type": "text", "text": prompt}] if media else prompt
    return [*([{"role": "system", "content": system}] if system is not None else []), {"role": "user", "content": content}]


def _sampling(model: Model, given: dict[str, Any], template: dict[str, Any], chats: bool) -> SamplingParams:
    """What is recommended for the mode, with what was given."""
    thinks = chats and template.get("enable_thinking", model.template.thinks_by_default())
    return dataclasses.replace(model.recommended(thinks), **given)
