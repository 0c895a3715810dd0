"""Texts and regular expressions as parts of a Lark grammar of `llguidance`."""

from __future__ import annotations

import json
from collections.abc import Sequence

_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def literal(text: str) -> str:
    """A text as a string."""
    return json.dumps(text, ensure_ascii=False)


def escaped(text: str) -> str:
    """A text as a part of a regular expression between slashes."""
    return "".join(_ESCAPES.get(char) or (char if char.isalnum() or char in " _<>=" or ord(char) > 127 else f"\\{char}") for char in text)


def expression(pattern: str) -> str:
    """A regular expression between slashes, whatever it holds."""
    made, skip = "", False
    for char in pattern:
        made += _ESCAPES.get(char, char) if skip or char != "/" else r"\/"
        skip = char == "\\" and not skip
    return f"/{made}/"


def without(texts: Sequence[str]) -> str:
    """A terminal: any text that holds none of these. One complement of all: several have many more states together."""
    return f"/(?s:.*)/ & ~/(?s:.*({'|'.join(map(escaped, texts))}).*)/"
