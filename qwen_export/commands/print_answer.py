"""Printing an answer while it is made: text and tool calls on stdout, how it went on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import click

from qwen_export.commands.output import is_quiet, notice
from qwen_export.commands.progress import progress
from qwen_export.errors import ContextOverflow
from qwen_export.terminal.answer_summary import CONTEXT_FULL, answer_summary, shown_finish
from qwen_export.terminal.answer_views import PlainView
from qwen_export.terminal.call_collector import CallCollector
from qwen_export.terminal.printable import printable

if TYPE_CHECKING:
    from qwen_export.runtimes.model import Generation

Tools = Sequence[dict[str, Any]]
Events = Callable[[], Iterator[Any]]


def plain_view() -> PlainView:
    """Answers on stdout. Reasoning is dim beside them on a terminal, and on stderr where stdout is a pipe."""
    terminal = sys.stdout.isatty()

    def write(text: str) -> None:
        click.echo(printable(text) if terminal else text, nl=False)

    def aside(text: str) -> None:
        if terminal or not is_quiet():
            click.echo(click.style(printable(text), dim=True), nl=False, err=not terminal)

    return PlainView(write, aside)


def print_answer(generation: Generation, events: Events, tools: Tools) -> None:
    """Reasoning aside, the answer plain, as `events` gives them, each tool call as a line of JSON; then a line about speed and why it
    ended. A full context is a normal end."""
    view, calls, ended = plain_view(), CallCollector(tools), ""
    try:
        for event in events():
            if event.kind == "reasoning":
                view.reasoning(event.text)
            elif text := calls.push(event.text):
                view.content(text)
    except ContextOverflow:
        if not generation.tokens:  # the prompt itself does not fit
            raise
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
    else:
        if text := calls.flush(generation.statistics.finish == "stop"):
            view.content(text)
    finally:
        ended = ended or shown_finish(generation.statistics.finish)
        if generation.statistics.new_tokens and ended:
            notice(answer_summary(generation.statistics, ended))
    view.end()
    for call in calls.calls:
        click.echo(json.dumps(call, ensure_ascii=False))


def json_answer(generation: Generation, events: Events, tools: Tools, logprobs: bool) -> dict[str, Any]:
    """The whole answer as one object. `tokens` are all ids; `logprobs`, where wanted, has each token's log probability and alternatives."""
    calls, ended, chosen, text = CallCollector(tools), "", [], ""
    try:
        for event in events():
            chosen += event.tokens
            text += calls.push(event.text) if event.kind == "answer" else ""
    except ContextOverflow:
        if not generation.tokens:
            raise
        ended = CONTEXT_FULL
    statistics = generation.statistics
    text += calls.flush(statistics.finish == "stop")
    finish = "tool_calls" if calls.calls and statistics.finish == "stop" else ended or shown_finish(statistics.finish)
    result: dict[str, Any] = {
        "text": text,
        "reasoning": generation.reasoning,
        "tool_calls": calls.calls,
        "finish": finish,
        "usage": usage([generation]),
        "tokens": generation.tokens,
    }
    if logprobs:
        result["logprobs"] = [{**_named(token), "top": [_named(other) for other in token.top]} for token in chosen]
    speeds = {"prefill_tok_per_s": statistics.prefill_tok_per_s, "decode_tok_per_s": statistics.decode_tok_per_s}
    result["statistics"] = dataclasses.asdict(statistics) | speeds
    return result


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """Tokens in the names of OpenAI's protocol, of answers to one prompt."""
    all_statistics = [generation.statistics for generation in generations]
    prompt, answers = all_statistics[0].prompt_tokens, sum(statistics.new_tokens for statistics in all_statistics)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {"cached_tokens": all_statistics[0].reused_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(statistics.reasoning_tokens for statistics in all_statistics)},
    }


def _named(token: Any) -> dict[str, Any]:
    return {"id": token.id, "text": token.text.decode("utf-8", "replace"), "bytes": list(token.text), "logprob": token.logprob}


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
