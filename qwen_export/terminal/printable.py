"""Text of a model on a terminal: without the control characters that would move the cursor, change colors or set the title."""

from __future__ import annotations

_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
# Marks that change the order of what is shown behind them.
_CONTROL |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)))


def printable(text: str) -> str:
    """The text without control characters but line breaks and tabs."""
    return text.translate(_CONTROL)
