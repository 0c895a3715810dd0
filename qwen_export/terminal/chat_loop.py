"""The loop of a conversation: a question or a command, then its answer, until the questions end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from qwen_export.errors import ContextOverflow, QwenExportError
from qwen_export.terminal.answer_summary import CONTEXT_FULL, answer_summary, shown_finish
from qwen_export.terminal.answer_views import AnswerView
from qwen_export.terminal.conversation import Conversation
from qwen_export.terminal.slash_commands import Leave, is_command, run_command

if TYPE_CHECKING:
    from qwen_export.runtimes.model import Generation

SHORTENED = "The conversation is longer than the context: /reset begins a new one."


def converse(
    conversation: Conversation,
    questions: Iterator[str],
    view: AnswerView,
    *,
    note: Callable[[str], None],
    summarize: Callable[[str], None],
    fail: Callable[[QwenExportError], None],
    interactive: bool,
) -> bool:
    """Answer every question. `note` prints what commands return, `summarize` the figures of an answer, `fail` an error. `interactive`:
    an interrupt ends an answer and not the conversation. Returns whether every question got an answer."""
    whole = True
    for line in questions:
        try:
            if is_command(line):
                note(run_command(conversation, line))
            else:
                ended = _answer(conversation, line.removeprefix("/") if line.startswith("//") else line, view, interactive)
                statistics = conversation.statistics
                if interactive and ended != "stop":
                    note(f"({ended})" if ended != CONTEXT_FULL else f"({ended}) {SHORTENED}")
                if statistics is not None:
                    summarize(answer_summary(statistics, ended))
        except Leave:
            break
        except QwenExportError as error:
            whole = False
            fail(error)
    return whole


def _answer(conversation: Conversation, question: str, view: AnswerView, interactive: bool) -> str:
    """Answer one question; returns why the answer ended."""
    generation: Generation | None = None
    ended = ""
    try:
        generation = conversation.ask(question, view.progress)
        with _interrupt_cancels(generation) if interactive else _unchanged():
            for event in generation.events():
                (view.reasoning if event.kind == "reasoning" else view.content)(event.text)
    except ContextOverflow:
        if generation is None or not generation.tokens:  # the prompt itself does not fit
            raise
        ended = CONTEXT_FULL
    except KeyboardInterrupt:
        if not interactive:
            raise
        ended = "interrupted"
    finally:
        view.end()
        if generation is not None:
            conversation.record(generation)
    return ended or (shown_finish(generation.statistics.finish) if generation is not None else "interrupted")


@contextmanager
def _interrupt_cancels(generation: Generation) -> Iterator[None]:
    """The first interrupt ends the answer after its token; a second one does not wait for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def cancel(signum: int, frame: FrameType | None) -> Any:
        signal.signal(signal.SIGINT, before)
        generation.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _unchanged() -> Iterator[None]:
    yield
