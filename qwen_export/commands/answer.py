"""Printing an answer while it is made: text on stdout, how it went on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from qwen_export.commands.output import notice
from qwen_export.commands.progress import progress
from qwen_export.errors import ContextOverflow

if TYPE_CHECKING:
    from qwen_export.runtimes.decoding.generation import SpeculationStatistics, Statistics
    from qwen_export.runtimes.model import Generation

CONTEXT_FULL = "context full"
_LOOK_EVERY_S = 0.2


def print_answer(generation: Generation) -> None:
    """Reasoning dim, the answer plain; then a line about speed and why it ended. A full context is a normal end."""
    from qwen_export.runtimes.text.reasoning import Reasoning

    reasoning, ended = False, ""
    try:
        for event in _events(generation):
            if isinstance(event, Reasoning) != reasoning:
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
        ended = ended or generation.statistics.finish
        if generation.statistics.new_tokens and ended:
            notice(_summary(generation.statistics, ended))


def print_json(generation: Generation) -> None:
    """One object at the end."""
    ended = ""
    try:
        for _ in _events(generation):
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
        "finish": ended or statistics.finish,
        "statistics": dataclasses.asdict(statistics)
        | {"prefill_tok_per_s": statistics.prefill_tok_per_s, "decode_tok_per_s": statistics.decode_tok_per_s},
    }
    click.echo(json.dumps(result, indent=1, ensure_ascii=False))


def _events(generation: Generation) -> Iterator[Any]:
    """The events; until the first one comes, how much of the prompt was read."""
    events = iter(generation.events())
    with _reading(generation.statistics):
        first = next(events, None)
    if first is not None:
        yield first
        yield from events


@contextmanager
def _reading(statistics: Statistics) -> Iterator[None]:
    """Progress of the prompt, which is read by the thread that runs the block: another one looks at the count."""
    done = threading.Event()

    def watch(report: Any) -> None:
        while not done.wait(_LOOK_EVERY_S):
            if not statistics.new_tokens:
                report("reading the prompt", statistics.read_tokens, statistics.prompt_tokens)

    with progress("tokens") as report:
        watcher = threading.Thread(target=watch, args=(report,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            sys.stderr.flush()


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
