"""Printing an answer while it is made: text on stdout, how it went on stderr."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import click

from qwen_export.commands.output import notice
from qwen_export.commands.progress import progress
from qwen_export.errors import ContextOverflow
from qwen_export.terminal.answer_summary import CONTEXT_FULL, answer_summary, shown_finish

if TYPE_CHECKING:
    from qwen_export.runtimes.model import Generation


def print_answer(generation: Generation, events: Callable[[], Iterator[Any]]) -> None:
    """Reasoning dim, the answer plain, as `events` gives them; then a line about speed and why it ended. A full context is a normal end."""
    reasoning, ended = False, ""
    try:
        for event in events():
            if (event.kind == "reasoning") != reasoning:
                reasoning = not reasoning
                if not reasoning:
                    click.echo("\n")
            click.echo(click.style(event.text, dim=True) if reasoning else event.text, nl=False)
        click.echo()
    except ContextOverflow:
        if not generation.tokens:  # the prompt itself does not fit
            raise
        click.echo()
        ended = CONTEXT_FULL
    except KeyboardInterrupt:
        ended = "interrupted"
        raise
    except BrokenPipeError:
        ended = "the reader of the output has gone"
        raise
    except OSError:
        ended = "the output could not be written"
        raise
    finally:
        ended = ended or shown_finish(generation.statistics.finish)
        if generation.statistics.new_tokens and ended:
            notice(answer_summary(generation.statistics, ended))


def print_json(generation: Generation, events: Callable[[], Iterator[Any]]) -> None:
    """One object at the end."""
    ended = ""
    try:
        for _ in events():
            pass
    except ContextOverflow:
        if not generation.tokens:
            raise
        ended = CONTEXT_FULL
    statistics = generation.statistics
    result: dict[str, Any] = {
        "text": generation.content,
        "reasoning": generation.reasoning,
        "tokens": generation.tokens,
        "finish": ended or shown_finish(statistics.finish),
        "statistics": dataclasses.asdict(statistics)
        | {"prefill_tok_per_s": statistics.prefill_tok_per_s, "decode_tok_per_s": statistics.decode_tok_per_s},
    }
    click.echo(json.dumps(result, indent=1, ensure_ascii=False))


@contextmanager
def prompt_progress() -> Iterator[Callable[[int, int], None]]:
    """Progress of reading the prompt, for the parameter `progress` of `Model.stream`: what is shown ends with the first token."""
    with progress("tokens") as report:
        yield lambda done, total: report("reading the prompt", done, total)


def read_prompt_first(generation: Generation) -> Iterator[Any]:
    """The events of an answer, whose prompt is read before this returns."""
    events = iter(generation.events())
    first = list(islice(events, 1))
    return chain(first, events)
