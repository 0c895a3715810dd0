"""Tool calls as rules of a grammar: names, keys and values that the tools of the request have, in the form that the template asks for.

    calls: call ("\\n" call)*
    call: <tool_call> "\\n<function=" (fn_0 | fn_1) "</function>\\n" </tool_call>
    fn_0: "write>\\n" a_0_3
    a_0_3: (p_0_0 a_0_2 | p_0_1 a_0_1)      both parameters are left, and one of them at least is required
    a_0_2: (p_0_1 a_0_0 | "")

A parameter that is text is written as it is, up to its closing tag, without what `ToolCallParser` would read as the end of it. The others
are JSON. Of a text `enum` and `const` hold, and where the tool is strict `pattern` and the lengths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_export.errors import ParameterError
from qwen_export.runtimes.structured.json_grammar import json_grammar
from qwen_export.runtimes.structured.lark_text import escaped, expression, literal
from qwen_export.runtimes.structured.tool_functions import ToolFunction
from qwen_export.runtimes.text.tool_values import STRING, is_text, typed_value

_ANY_ORDER = 5
"""Parameters that may come in any order, each once: n of them need 2^n rules. Of more, those that are required have an order, or their
sets as far as they are so many, and optional ones may come between them."""
_SPACE = r"[ \n\t\r]*"
_END = literal("\n</parameter>\n")


def call_rules(functions: Sequence[ToolFunction], *, parallel: bool, exact: bool) -> list[str]:
    """Rules with the name `calls`. Without `exact` the values of tools that are not strict are JSON of the right type. Raises
    ParameterError for a schema that is not JSON, and for names that the form cannot hold."""
    names = " | ".join(f"fn_{index}" for index in range(len(functions)))
    rules = [
        'calls: call ("\\n" call)*' if parallel else "calls: call",
        f'call: <tool_call> "\\n<function=" ({names}) "</function>\\n" </tool_call>',
    ]
    for index, function in enumerate(functions):
        if any(char in name for name in (function.name, *function.parameters) for char in ">\n<"):
            raise ParameterError(
                "a name of a tool cannot be written in the form of a call",
                parameter="tools",
                got=repr(function.name),
                expected="names without angle brackets and line breaks",
                fix="Rename the function or the parameter.",
            )
        rules += _function(index, function, exact=exact or function.strict)
    return rules


def _function(index: int, function: ToolFunction, *, exact: bool) -> list[str]:
    keys = list(function.parameters)
    rules = []
    for place, key in enumerate(keys):
        value, more = _value(f"{index}_{place}", function, key, exact=exact)
        rules += [f"p_{index}_{place}: {literal(f'<parameter={key}>' + chr(10))} {value}", *more]
    needed = [keys.index(key) for key in dict.fromkeys(function.required)]
    every = len(keys) <= _ANY_ORDER
    steps = range(len(keys)) if every else needed
    optional = [f"p_{index}_{place}" for place in range(len(keys)) if place not in steps]
    between = f"({' | '.join(optional)}){{0,{len(optional)}}} " if optional else ""
    whole = sum(1 << place for place in steps)
    rules.append(f"fn_{index}: {literal(function.name + '>' + chr(10))} a_{index}_{whole}")
    # A rule per set of parameters that may still come, one bit each; in order, the sets are those without the first ones.
    in_order = len(steps) > _ANY_ORDER
    sets = [sum(1 << place for place in steps[done:]) for done in range(len(steps) + 1)] if in_order else _subsets(steps)
    for left in sets:
        places = [place for place in steps if left >> place & 1]
        nexts = [f"p_{index}_{place} a_{index}_{left & ~(1 << place)}" for place in places[: 1 if in_order else None]]
        if not any(place in needed for place in places):
            nexts.append('""')
        rules.append(f"a_{index}_{left}: {between}({' | '.join(nexts)})")
    return rules


def _subsets(places: Sequence[int]) -> list[int]:
    """All sets of these, as bits."""
    sets = [0]
    for place in places:
        sets += [left | 1 << place for left in sets]
    return sets


def _value(name: str, function: ToolFunction, key: str, *, exact: bool) -> tuple[str, list[str]]:
    """What follows the opening tag of a parameter, closing tag included, and rules that it needs."""
    schema, types = function.parameters[key], function.schema.parameters[key]
    values = _values(schema)
    if values is not None:
        texts = [text for value in values if (text := _text(value, types)) is not None]
        if texts:
            return f"({' | '.join(map(literal, texts))}) {_END}", []
    if is_text(types) or STRING in types:
        body = _plain_text(tuple(function.parameters))
        if exact and function.strict and is_text(types) and isinstance(schema, Mapping):
            body += _limits(schema)
        return f"t_{name}", [f"t_{name}[suffix={_END}]: {body}"]
    whole = {**schema, **function.definitions} if isinstance(schema, Mapping) and exact else {"type": sorted(types)}
    made = json_grammar(whole, strict=function.strict, parameter="tools")
    return f"%json {json.dumps(made)} {_END}", []


def _values(schema: Any) -> Sequence[Any] | None:
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), (list, tuple)) and schema["enum"] else None


def _text(value: Any, types: frozenset[str]) -> str | None:
    """The text that is read as a value; None where there is none."""
    if isinstance(value, str):
        return value if typed_value(value, types) == value else None
    return json.dumps(value, ensure_ascii=False)


def _plain_text(keys: tuple[str, ...]) -> str:
    """Text that a reader of calls takes as one value of a tool with these parameters."""
    begins = "|".join(map(escaped, keys))
    on_a_line = [f"<parameter=({begins})>", rf"<\/function>{_SPACE}<\/tool_call>", rf"<\/tool_call>{_SPACE}<tool_call>"]
    anywhere = rf"<\/parameter>{_SPACE}(<parameter=|<\/function>|<\/tool_call>)"
    return f"/(?s:.*)/ & ~/(?s:((.*\\n)?({'|'.join(on_a_line)})|.*{anywhere}).*)/"


def _limits(schema: Mapping[str, Any]) -> str:
    """Terminals for the length and the pattern of a text."""
    made = ""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if least or most != "":
        made += f" & /(?s:.{{{least},{most}}})/"
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        begin = "" if pattern.startswith("^") else "(?s:.*)"
        end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
        inner = pattern.removeprefix("^").removesuffix("$" if not end else "\0")
        made += " & " + expression(f"{begin}({inner}){end}")
    return made
