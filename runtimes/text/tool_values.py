"""Values of tool-call arguments: text in the answer, typed by the JSON schema of the tool.

The model writes strings as they are and everything else as JSON. What the schema allows decides: the first of null, integer, number,
boolean, object, array and string that the text is. A text that is none of what is allowed stays a string: a call is never dropped.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STRING, NULL = "string", "null"
_ORDER = (NULL, "integer", "number", "boolean", "object", "array", STRING)
# Names of Python's types, which people write into schemas.
_ALIASES = {"str": STRING, "int": "integer", "float": "number", "bool": "boolean", "dict": "object", "list": "array", "none": NULL}
_MAX_DEPTH = 16
_MAX_LITERAL = 1_000_000
_INTEGER = re.compile(r"-?\d{1,4000}")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_BOOLEANS = {"true": True, "True": True, "false": False, "False": False}


@dataclass(frozen=True)
class ToolSchema:
    """One function: the types that each of its parameters may have; a parameter without an entry is text."""

    name: str
    parameters: Mapping[str, frozenset[str]] = field(default_factory=dict)


def read_tools(tools: Sequence[Mapping[str, Any]]) -> dict[str, ToolSchema]:
    """The tools of a request by name: {"type": "function", "function": {name, parameters}}, or {name, parameters | input_schema}."""
    found = {}
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            schema = function.get("parameters", function.get("input_schema"))
            properties = schema.get("properties") if isinstance(schema, Mapping) else None
            types = {key: _types(value, schema) for key, value in properties.items()} if isinstance(properties, Mapping) else {}
            found[name] = ToolSchema(name, types)
    return found


def _types(schema: Any, root: Any, depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema allows; empty where it names none."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return frozenset()
    if isinstance(schema.get("$ref"), str):
        return _types(_resolve(schema["$ref"], root), root, depth + 1)
    stated = schema.get("type")
    names = [stated] if isinstance(stated, str) else stated if isinstance(stated, (list, tuple)) else []
    types = frozenset(known for name in names if (known := _ALIASES.get(str(name).lower(), str(name))) in _ORDER)
    if types:
        return types
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), (list, tuple)):
            return frozenset[str]().union(*(_types(part, root, depth + 1) for part in schema[key]))
    if isinstance(schema.get("allOf"), (list, tuple)):
        parts = [found for part in schema["allOf"] if (found := _types(part, root, depth + 1))]
        return frozenset.intersection(*parts) if parts else frozenset()
    values = schema["enum"] if isinstance(schema.get("enum"), (list, tuple)) else [schema["const"]] if "const" in schema else []
    if values:
        return frozenset(map(_type_of, values))
    return frozenset({"object"}) if "properties" in schema else frozenset({"array"}) if "items" in schema else frozenset()


def _resolve(reference: str, root: Any) -> Any:
    """A reference within the schema, such as #/$defs/R."""
    target = root
    for part in reference.removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        target = target.get(key) if isinstance(target, Mapping) else None
    return target


def _type_of(value: Any) -> str:
    if value is None:
        return NULL
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, STRING), (Mapping, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "array")


def is_text(types: frozenset[str]) -> bool:
    """Whether a value is its text, whatever that is."""
    return types <= {STRING}


def typed_value(text: str, types: frozenset[str]) -> Any:
    """The value that a text is, as JSON can hold it: no NaN, no infinity."""
    if not is_text(types):
        for name in _ORDER[:-1]:
            if name in types:
                value = _READERS[name](text.strip())
                if value is not _NONE:
                    return value
    return text


class _Missing:
    pass


_NONE = _Missing()


def _null(text: str) -> Any:
    return None if text in ("null", "None") else _NONE


def _integer(text: str) -> Any:
    if _INTEGER.fullmatch(text):
        return int(text)
    number = _number(text)
    return int(number) if isinstance(number, float) and number == int(number) else _NONE


def _number(text: str) -> Any:
    if _INTEGER.fullmatch(text):
        return int(text)
    number = float(text) if len(text) < 1000 and _NUMBER.fullmatch(text) else math.nan
    return number if math.isfinite(number) else _NONE


def _boolean(text: str) -> Any:
    return _BOOLEANS.get(text, _NONE)


def _object(text: str) -> Any:
    value = _container(text)
    return value if isinstance(value, dict) else _NONE


def _array(text: str) -> Any:
    value = _container(text)
    return value if isinstance(value, list) else _NONE


_READERS = {NULL: _null, "integer": _integer, "number": _number, "boolean": _boolean, "object": _object, "array": _array}


def _container(text: str) -> Any:
    """JSON, or what Python writes for it."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > _MAX_LITERAL:
        return _NONE
    try:
        return _plain(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _NONE


def parse_json(text: str) -> Any:
    """Strict JSON: NaN, infinities and numbers too large for them are no values. Raises ValueError."""
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _plain(value: Any) -> Any:
    """A Python literal as JSON. Raises TypeError for what JSON does not have."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError
