"""What comes from outside is marked as plain text before the template renders it (`TextTokenizer.shield`).

Outside: everything in user and tool messages; in every message the names and the arguments of calls; descriptions of tools; template
variables. Not marked: the text of system messages, which is the operator's, and text and reasoning of assistant messages, which the model
itself wrote with its tags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen_export.runtimes.text.text_tokenizer import TextTokenizer

_OUTSIDE = frozenset({"user", "tool", "function"})
# Of other roles: texts that were not written outside.
_OWN_TEXT = frozenset({"content", "reasoning_content", "reasoning"})


def shield_messages(messages: Sequence[Mapping[str, Any]], tokenizer: TextTokenizer) -> list[dict[str, Any]]:
    """A copy of the messages in which control tokens of outside text are plain text to `tokenizer.encode`."""
    shielded = []
    for message in messages:
        own = frozenset[str]() if message.get("role") in _OUTSIDE else _OWN_TEXT
        shielded.append({key: value if key in own or key == "role" else _map(value, tokenizer.shield) for key, value in message.items()})
    return shielded


def shield_values(value: Any, tokenizer: TextTokenizer) -> Any:
    """The same for all strings of a JSON value: tools, template variables."""
    return _map(value, tokenizer.shield)


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key) if isinstance(key, str) else key: _map(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map(item, change) for item in value]
    return value
