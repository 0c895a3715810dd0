"""Where the questions of a conversation come from: a person at a terminal, or lines of a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_export.terminal.slash_commands import COMMANDS, is_command

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from qwen_export.terminal.conversation import Conversation

HISTORY = "chat-history"
"""Name of the file of past questions, in the user's directory for state."""
HINT = "Ctrl-C ends an answer. Ctrl-D or /quit ends the conversation."


def piped_questions(lines: Iterable[str]) -> Iterator[str]:
    """One question a line; a backslash at its end goes on in the next one. Empty lines are none."""
    begun = ""
    for line in lines:
        text = line.rstrip("\r\n")
        if text.endswith("\\"):
            begun += text[:-1] + "\n"
            continue
        if (begun + text).strip():
            yield begun + text
        begun = ""
    if begun.strip():
        yield begun.rstrip("\n")


def terminal_questions(conversation: Conversation, history: Path | None, hint: Callable[[str], None]) -> Iterator[str]:
    """What a person types, until Ctrl-D. Enter sends; Alt-Enter and a backslash at the end of a line begin a new one, and what is pasted
    keeps its lines. `history`: the file of past questions."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.filters import Condition

    session: PromptSession[str] = PromptSession(
        multiline=True,
        key_bindings=_keys(),
        history=_history(history),
        completer=WordCompleter([f"/{name}" for name in COMMANDS], sentence=True),
        complete_while_typing=Condition(lambda: is_command(session.default_buffer.text)),
        enable_history_search=False,
        prompt_continuation=lambda width, line, wrapped: " " * width,
        bottom_toolbar=None,
    )
    while True:
        try:
            question = session.prompt("> ")
        except KeyboardInterrupt:
            hint(HINT)
            continue
        except EOFError:
            return
        if question.strip():
            yield question.strip("\n")


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\" and not buffer.document.text_after_cursor:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(path: Path | None) -> History:
    """The file, which only its owner can read; memory where there is none or it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)):
            pass
    except OSError:
        return InMemoryHistory()

    class Kept(FileHistory):
        """Past questions; a disk that becomes full does not end the conversation."""

        def store_string(self, string: str) -> None:
            with suppress(OSError):
                super().store_string(string)

        def load_history_strings(self) -> Any:
            try:
                return list(super().load_history_strings())
            except OSError:
                return []

    return Kept(path)
