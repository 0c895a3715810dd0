"""Small pieces of JSON for the protocols, made without objects in between."""

from __future__ import annotations

import json
import secrets
from json.encoder import encode_basestring
from typing import Any

quoted = encode_basestring
"""A text as a JSON string."""

DONE = b"data: [DONE]\n\n"


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def data_line(value: Any) -> bytes:
    """An event without a name."""
    return f"data: {dump(value)}\n\n".encode()


def shown(text: bytes) -> str:
    """The text of a token; U+FFFD for half a character."""
    return text.decode(errors="replace")
