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

if TYPE_CHECKING:
    from qwen_export.runtimes.decoding.generation import SpeculationStatistics, Statistics
    from qwen_export.runtimes.model import Generation

CONTEXT_FULL = "context full"
FINISH = {"overflow": CONTEXT_FULL}
"""How `Statistics.finish` is shown, where that is not the word itself."""


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
        ended = ended or FINISH.get(generation.statistics.finish, generation.statistics.finish)
        if generation.statistics.new_tokens and ended:
            notice(_summary(generation.statistics, ended))


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
        "finish": ended or FINISH.get(statistics.finish, statistics.finish),
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


def _summary(s: Statistics, ended: str) -> str:
    read = f"{s.prompt_tokens} prompt tokens" + (f" ({s.reused_tokens} reused)" if s.reused_tokens else "")
    return (
        f"{read}, first token after {s.first_token_s:.3f} s ({s.prefill_tok_per_s:.0f} tok/s), "
        f"{s.new_tokens} new tokens at {s.decode_tok_per_s:.1f} tok/s, {ended}{_drafts(s.speculation)}"
    )


def _drafts(s: SpeculationStatistics) -> str:
    if not sum(s.drafted):
        return ""
    shares = " / ".join(f"{share:.0%}" for share in s.acceptance)
    return (
        f"\n{s.rounds} rounds of {s.tokens_per_round:.2f} tokens, drafts kept {shares}; "
        f"draft {s.draft_s:.2f} s, verify {s.verify_s:.2f} s, host {s.host_s:.2f} s"
    )
