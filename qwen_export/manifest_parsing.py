"""JSON of a manifest to its typed fields, strictly: a wrong type, a negative number or a control character is an error with its place."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from qwen_export.manifest_types import Manifest

# Reading the hints of a class takes longer than parsing a value of it.
_hints = cache(get_type_hints)
_LARGEST_NUMBER = 2**62
_DEEPEST = 16


def decode(data: bytes) -> Any:
    """Parse JSON. Raises ValueError for what is not JSON, nan and infinity, and a name that is given twice."""

    def no_constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is given twice in one object")
        return found

    return json.loads(data.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=unique)


def parse(value: Any) -> Manifest:
    """The manifest of parsed JSON. Raises ValueError."""
    manifest: Manifest = _parse(Manifest, value)
    return manifest


def _parse(kind: Any, value: Any, where: str = "") -> Any:
    """`value`, parsed JSON, as the type `kind`: a dataclass, tuple, dict, union or plain type. Raises ValueError with the place that is
    wrong. Unknown fields are left out: a newer minor version may add some."""
    if kind is Any:
        _check_plain(value, where, 0)
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        given, hints = _expect(dict, value, where), _hints(kind)
        missing = [f.name for f in fields(kind) if f.name not in given and f.default is MISSING and f.default_factory is MISSING]
        if missing:
            raise ValueError(f"{where or 'the manifest'} has no {missing[0]}")
        return kind(
            **{f.name: _parse(hints[f.name], given[f.name], f"{where}.{f.name}".lstrip(".")) for f in fields(kind) if f.name in given}
        )
    container, arguments = get_origin(kind), get_args(kind)
    if container is tuple:
        return tuple(_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(_expect(list, value, where)))
    if container is dict:
        return {_text(key, where): _parse(arguments[1], item, f"{where}.{key}") for key, item in _expect(dict, value, where).items()}
    if container is UnionType:
        if value is None and NoneType in arguments:
            return None
        return _parse(next((option for option in arguments if type(value) is option), arguments[0]), value, where)
    if kind is float:
        if type(value) not in (int, float) or abs(value) > _LARGEST_NUMBER or not math.isfinite(value):
            raise ValueError(f"{where} is not a number")
        return float(value)
    _expect(kind, value, where)
    if kind is str:
        _text(value, where)
    if kind is int:
        _number(value, where)
    return value


def _check_plain(value: Any, where: str, depth: int) -> None:
    """A value whose form only its readers know: bounded depth, and texts and numbers as everywhere."""
    if depth > _DEEPEST:
        raise ValueError(f"{where} is nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{where}.{_text(key, where)}", depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, where, depth + 1)
    elif isinstance(value, str):
        _text(value, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is not a finite number")
    elif type(value) is int and abs(value) > _LARGEST_NUMBER:
        raise ValueError(f"{where} is too large a number")


def _text(value: str, where: str) -> str:
    """A text without control characters, which a terminal would carry out, and without halves of characters."""
    if not value.isprintable() and any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in value):
        raise ValueError(f"{where} has control characters")
    return value


def _number(value: int, where: str) -> None:
    if value < 0:
        raise ValueError(f"{where} is negative")
    if value > _LARGEST_NUMBER:
        raise ValueError(f"{where} is too large a number")


def _expect(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{where or 'the manifest'} is a {type(value).__name__}, not a {kind.__name__}")
    return value
