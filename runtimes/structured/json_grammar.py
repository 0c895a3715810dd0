"""JSON schemas as `llguidance` compiles them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qwen_export.errors import ParameterError

SPACES = r"( |\n {0,16})?"
"""White space between the parts of JSON: compact, spaced or indented. JSON itself has no bound, and a model may not find out of it."""
_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties", "propertyNames"}
"""Keywords of objects that are meant to have other properties."""
_LARGEST = (1 << 53) - 1
_ALIASES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object", "list": "array", "none": "null"}
"""Names of Python's types, which people write into schemas."""
_NAMES = ("properties", "$defs", "definitions", "patternProperties")
"""Keywords whose values are schemas by name."""
_DATA = ("enum", "const", "default", "examples")
"""Keywords whose values are no schemas."""


def json_grammar(schema: Any, *, strict: bool, parameter: str = "form") -> dict[str, Any]:
    """A schema with how it is compiled. What llguidance does not know of it is an error, or with `strict` False left out. Raises
    ParameterError for a schema that no text fits, and for one that is not JSON."""
    known = {} if schema is True else schema
    if not isinstance(known, Mapping):
        raise ParameterError("no text fits the schema", parameter=parameter, got="false", expected="an object", fix="Give another schema.")
    options = {"whitespace_pattern": SPACES, "coerce_one_of": True, "lenient": not strict}
    try:
        made: dict[str, Any] = json.loads(json.dumps({**known, "x-guidance": options}, allow_nan=False))
        return _with_types(made, closed="allOf" not in json.dumps(made))
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(
            "the schema is not JSON", parameter=parameter, got=error, expected="what JSON can hold", fix="Correct the schema."
        ) from error


def _with_types(schema: Any, closed: bool) -> Any:
    """A schema with JSON's names of types, and with bounds where JSON has none and a model may not come to an end: integers have 53 bits,
    which every client holds, and with `closed` objects have the properties that are named. Parts of an allOf name some of them only."""
    if isinstance(schema, list):
        return [_with_types(part, closed) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMES and isinstance(value, dict):
            made[key] = {name: _with_types(part, closed) for name, part in value.items()}
        elif key == "type":
            made[key] = [_ALIASES.get(str(name), name) for name in value] if isinstance(value, list) else _ALIASES.get(str(value), value)
        else:
            made[key] = value if key in _DATA else _with_types(value, closed)
    if "integer" in _types(made):
        if not {"minimum", "exclusiveMinimum"} & made.keys():
            made["minimum"] = -_LARGEST
        if not {"maximum", "exclusiveMaximum"} & made.keys():
            made["maximum"] = _LARGEST
    if closed and made.get("properties") and not _OPEN & made.keys():
        made["additionalProperties"] = False
    return made


def _types(schema: Mapping[str, Any]) -> list[Any]:
    given = schema.get("type", [])
    return given if isinstance(given, list) else [given]
