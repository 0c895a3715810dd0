"""The tools of a request as a grammar needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_export.runtimes.text.tool_values import ToolSchema, read_tools


@dataclass(frozen=True)
class ToolFunction:
    """A tool: the schema of each parameter by name, those that a call must have, and definitions that the schemas refer to. `schema`:
    the types of the parameters. `strict`: the caller relies on the arguments being valid."""

    name: str
    parameters: Mapping[str, Any]
    required: tuple[str, ...]
    definitions: Mapping[str, Any]
    schema: ToolSchema
    strict: bool


def tool_functions(tools: Sequence[Mapping[str, Any]]) -> list[ToolFunction]:
    """The functions among the tools of a request, each name once."""
    types = read_tools(tools)
    found: dict[str, ToolFunction] = {}
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            continue
        schema = function.get("parameters", function.get("input_schema"))
        root: Mapping[str, Any] = schema if isinstance(schema, Mapping) else {}
        properties = root.get("properties")
        parameters = dict(properties) if isinstance(properties, Mapping) else {}
        required = root.get("required")
        names = tuple(key for key in required if key in parameters) if isinstance(required, (list, tuple)) else ()
        definitions = {key: root[key] for key in ("$defs", "definitions") if isinstance(root.get(key), Mapping)}
        strict = bool(function.get("strict") or tool.get("strict"))
        found[name] = ToolFunction(name, parameters, names, definitions, types[name], strict)
    return list(found.values())
