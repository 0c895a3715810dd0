"""The tool calls of an answer, collected while its text goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


class CallCollector:
    """Takes the pieces of an answer. `calls` has those that are complete, as {name, arguments}; where the arguments were cut off they are
    the text that there is of them."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        from qwen_export.runtimes.text.tool_calls import ToolCallParser

        self._parser = ToolCallParser(tools)
        self._names: list[str] = []
        self._arguments: list[str] = []

    def push(self, text: str) -> str:
        """The text of the answer that is no part of a call."""
        return self._take(self._parser.push(text))

    def flush(self, complete: bool) -> str:
        """What was held back when the answer ended. `complete`: by itself, and not by a limit."""
        return self._take(self._parser.flush(complete))

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [{"name": name, "arguments": _read(text)} for name, text in zip(self._names, self._arguments, strict=True)]

    def _take(self, events: Sequence[Any]) -> str:
        from qwen_export.runtimes.text.reasoning import Content
        from qwen_export.runtimes.text.tool_calls import CallArguments, CallStarted

        text = ""
        for event in events:
            if isinstance(event, Content):
                text += event.text
            elif isinstance(event, CallStarted):
                self._names.append(event.name)
                self._arguments.append("")
            elif isinstance(event, CallArguments):
                self._arguments[event.index] += event.text
        return text


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
