"""Typed access to one JSON object of a checkpoint. Each error names the file and the key."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from qwen_export.errors import ConfigError

LARGEST = 2**31 - 1
"""The largest integer of a configuration. Sizes are multiplied, and a hostile number must not become memory or time."""

_SHOWN = 120


class Fields:
    """One JSON object. `where` is the file that it was read from."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = LARGEST) -> int:
        value = self.data.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.wrong(key, value, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: float | None = None, maximum: float = sys.float_info.max) -> float:
        value = self.data.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= maximum:
            raise self.wrong(key, value, "a positive number" if maximum == sys.float_info.max else f"a positive number up to {maximum:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def must_be(self, key: str, *allowed: Any) -> None:
        """The key has one of the values that are implemented. A missing key has the first one."""
        value = self.data.get(key, allowed[0])
        if not any(type(value) is type(option) and value == option for option in allowed):
            raise self.wrong(key, value, " or ".join(map(repr, allowed)))

    def wrong(self, key: str, got: Any, expected: str) -> ConfigError:
        return ConfigError(
            f"config value {key!r} cannot be used",
            where=self.where,
            got="nothing" if got is None else shown(got),
            expected=expected,
            fix="Correct the file, or download it again.",
        )


def shown(value: object) -> str:
    """The value as an error message prints it: of bounded length, whatever the file holds."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists in lists
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
