"""Types of command line values that click does not have."""

from __future__ import annotations

import json
import math
from typing import Any

import click


class Numbers(click.ParamType):
    """Comma-separated integers, positive ones unless `least` says otherwise."""

    name = "N,N,..."

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if value == ():
            return ()
        if not numbers or min(numbers) < self.least:
            kind, example = ("positive integers", "128,512") if self.least else ("numbers of devices", "0,1")
            self.fail(f"{value!r} is not a list of {kind} such as {example}", param, ctx)
        return numbers


class Finite(click.ParamType):
    """A number that is not nan or infinite."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Gigabytes(click.ParamType):
    """Units of 10^9 bytes; the command gets bytes. `least` in gigabytes."""

    name = "GB"
    _MOST = 1e6

    def __init__(self, least: float = 0.0) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = Finite().convert(value, param, ctx)
        if not self.least <= number <= self._MOST:
            self.fail(f"{value} is outside {self.least:g} to {self._MOST:g} GB", param, ctx)
        return int(number * 1e9)


class KeyValue(click.ParamType):
    """KEY=JSON; a value that is not JSON is a string: `reasoning_effort=low`."""

    name = "KEY=JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        key, sign, text = str(value).partition("=")
        if not sign or not key.isidentifier():
            self.fail(f'{value!r} is not KEY=JSON, such as reasoning_effort="low"', param, ctx)
        try:
            return key, json.loads(text)
        except (ValueError, RecursionError):
            return key, text


class Speculation(click.ParamType):
    """auto, off, lookup, or the length of every draft."""

    name = "auto|off|lookup|K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        text = str(value)
        if text.isascii() and text.isdigit() and len(text) < 10:
            return int(text)
        if text not in ("auto", "off", "lookup"):
            self.fail(f"{text!r} is none of auto, off, lookup or a number of tokens", param, ctx)
        return text
