"""Tool calls in an answer, found and typed while it streams.

The template asks for this form, from which models sometimes depart:

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Line breaks next to tags belong to the tags. What opens a call: `<tool_call>` with `<function=` or a JSON object behind it (the form of
older models: {"name", "arguments"}), and `<function=NAME>` alone for a tool of the request. Closing tags may be missing. A value ends at
`</parameter>` only if the next thing is `<parameter=`, `</function>`, `</tool_call>` or the end; or, without it, at a line that opens a
parameter of the tool which is not given yet, or that closes the function. So a value may hold text about this form.

Values that are text stream as they come; others are typed by the tool's schema when they are complete (`tool_values.py`). At most the end
of the text that may belong to a tag is held back, and where the text is cut into pieces has no influence on what comes out in all.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from qwen_export.runtimes.text.reasoning import Content
from qwen_export.runtimes.text.tag_matching import CALL, FUNCTION, matches, one_of, opens_call, skip_space
from qwen_export.runtimes.text.tool_values import NULL, STRING, ToolSchema, is_text, parse_json, read_tools, typed_value

CALL_END, FUNCTION_END, PARAMETER, PARAMETER_END = "</tool_call>", "</function>", "<parameter=", "</parameter>"


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call, numbered from 0 in the answer; `id` is unique."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the call's arguments; all pieces of a call that ended are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The call is complete. A call without it was cut off, and its arguments are not whole."""

    index: int


CallEvent = Content | CallStarted | CallArguments | CallEnded


class _In(Enum):
    TEXT = auto()
    BLOCK = auto()  # behind `<tool_call>` or `</function>`
    NAME = auto()  # behind `<function=`
    FUNCTION = auto()  # between parameters
    KEY = auto()  # behind `<parameter=`
    VALUE = auto()
    OBJECT = auto()  # in the JSON form


def new_call_id() -> str:
    """As OpenAI's protocol has them."""
    return "call_" + secrets.token_hex(12)


class ToolCallParser:
    """Parses the content of one answer (what `ReasoningSplitter` leaves of it). Without tools everything is text."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None, new_id: Callable[[], str] = new_call_id) -> None:
        self._tools, self._new_id = read_tools(tools or ()), new_id
        self._in = _In.TEXT
        self._held = ""
        self._behind_call = False
        self.calls = 0
        """Calls that have begun."""
        self._tool = ToolSchema("")
        self._given: set[str] = set()
        self._key = ""
        self._value: _Value | None = None
        self._value_begins = False
        self._object = _ObjectEnd()

    def push(self, text: str) -> list[CallEvent]:
        """What `text` makes certain."""
        if not self._tools:
            return [Content(text)] if text else []
        self._held += text
        return list(self._advance(ended=False))

    def flush(self, complete: bool = True) -> list[CallEvent]:
        """What was held back when the answer ended. `complete`: the model stopped by itself, and closes what it left open; False for an
        answer that was cut off: its last call stays without an end."""
        events = list(self._advance(ended=True))
        held, self._held = self._held, ""
        match self._in:
            case _In.TEXT:
                events += self._text(held)
            case _In.NAME:
                events += self._text(FUNCTION + held)
            case _In.OBJECT:
                events += self._text(CALL + held)
            case _In.VALUE:
                events += self._end_value(held.removesuffix("\n")) if complete else self._part_of_value(held)
        if complete and self._in in (_In.FUNCTION, _In.KEY, _In.VALUE):
            events += self._end_call()
        return events

    def _advance(self, ended: bool) -> Iterator[CallEvent]:
        steps = {
            _In.TEXT: self._in_text,
            _In.BLOCK: self._in_block,
            _In.NAME: self._in_name,
            _In.FUNCTION: self._in_function,
            _In.KEY: self._in_key,
            _In.VALUE: self._in_value,
            _In.OBJECT: self._in_object,
        }
        going = True
        while going:
            before, length = self._in, len(self._held)
            yield from steps[self._in](ended)
            going = self._in is not before or len(self._held) < length

    def _in_text(self, ended: bool) -> Iterator[CallEvent]:
        at = self._held.find("<")
        while at >= 0:
            opens = opens_call(self._held, at, (FUNCTION, "{"))
            if not opens:
                bare = self._bare_call(at)
                opens = bare if bare is not False else opens
            if opens is None and not ended:
                break
            if opens:
                yield from self._text(self._held[:at].rstrip("\n"))
                start = skip_space(self._held, at + len(CALL)) if self._held.startswith(CALL, at) else at
                self._held = self._held[start:]
                self._in, self._object = (_In.OBJECT, _ObjectEnd()) if self._held[0] == "{" else (_In.BLOCK, self._object)
                return
            at = self._held.find("<", at + 1)
        certain = self._held if at < 0 else self._held[:at]
        certain = certain.rstrip("\n")
        self._held = self._held[len(certain) :]
        yield from self._text(certain)

    def _bare_call(self, at: int) -> bool | None:
        """Whether `<function=NAME>` of a known tool stands there."""
        found = [matches(self._held, at, f"{FUNCTION}{name}>") for name in self._tools]
        return True if True in found else None if None in found else False

    def _text(self, text: str) -> Iterator[CallEvent]:
        if self._behind_call:
            text = text.lstrip("\n")
        if text:
            self._behind_call = False
            yield Content(text)

    def _in_block(self, ended: bool) -> Iterator[CallEvent]:
        at = skip_space(self._held, 0)
        if matches(self._held, at, FUNCTION):
            self._held, self._in = self._held[at + len(FUNCTION) :], _In.NAME
        elif matches(self._held, at, CALL_END):
            self._held, self._in = self._held[at + len(CALL_END) :], _In.TEXT
        elif ended or one_of(self._held, at, (FUNCTION, CALL_END)) is False:
            # A tag that the end of the answer cut off is dropped.
            self._held = "" if ended and one_of(self._held, at, (FUNCTION, CALL_END)) is None else self._held
            self._in = _In.TEXT
        yield from ()

    def _in_name(self, ended: bool) -> Iterator[CallEvent]:
        end = next((i for i, char in enumerate(self._held) if char in ">\n<"), -1)
        if end < 0:
            return
        name = self._held[:end].strip()
        self._held, self._in = self._held[end + (self._held[end] == ">") :], _In.FUNCTION
        self._tool, self._given = self._tools.get(name, ToolSchema(name)), set()
        self.calls += 1
        self._behind_call = True
        yield CallStarted(self.calls - 1, self._new_id(), name)

    def _in_function(self, ended: bool) -> Iterator[CallEvent]:
        at = skip_space(self._held, 0)
        ends = (FUNCTION_END, CALL_END, CALL, FUNCTION)
        if matches(self._held, at, PARAMETER):
            self._held, self._in = self._held[at + len(PARAMETER) :], _In.KEY
        elif one_of(self._held, at, ends):
            self._held = self._held[at + (len(FUNCTION_END) if self._held.startswith(FUNCTION_END, at) else 0) :]
            yield from self._end_call()
        elif one_of(self._held, at, (PARAMETER, *ends)) is False:
            # Anything else between parameters is not part of the form.
            following = self._held.find("<", at + 1)
            self._held = self._held[following:] if following >= 0 else ""
        elif not ended:
            self._held = self._held[at:]

    def _in_key(self, ended: bool) -> Iterator[CallEvent]:
        end = next((i for i, char in enumerate(self._held) if char in ">\n"), -1)
        if end < 0 or (end + 1 == len(self._held) and not ended):
            return  # the line break behind `>` belongs to the tag
        self._key = self._held[:end].strip()
        start = end + 1 + (self._held[end] == ">" and self._held.startswith("\n", end + 1))
        self._held, self._in = self._held[start:], _In.VALUE
        self._value_begins = True
        first = self._key not in self._given
        self._value = _Value(self._tool.parameters.get(self._key, frozenset())) if first else None
        if first:
            opening = ("{" if not self._given else ", ") + json.dumps(self._key, ensure_ascii=False) + ": "
            self._given.add(self._key)
            yield CallArguments(self.calls - 1, opening)

    def _in_value(self, ended: bool) -> Iterator[CallEvent]:
        end, tag = self._end_of_value(ended)
        text = self._held[:end]
        if tag is None:
            text = text.removesuffix("\n")
            self._held = self._held[len(text) :]
            self._value_begins = self._value_begins and not text
            yield from self._part_of_value(text)
        else:
            self._held = self._held[end + len(tag) :]
            self._in = _In.FUNCTION
            yield from self._end_value(text.removesuffix("\n"))

    def _end_of_value(self, ended: bool) -> tuple[int, str | None]:
        """Where the held text stops to be certain value, and the tag that ends it there ("" for one that is not dropped); None while
        nothing does."""
        at = self._held.find("<")
        while at >= 0:
            ends = self._ends_value(at, ended)
            if ends:
                return at, PARAMETER_END if self._held.startswith(PARAMETER_END, at) else ""
            if ends is None:
                return at, None
            at = self._held.find("<", at + 1)
        return len(self._held), None

    def _ends_value(self, at: int, ended: bool) -> bool | None:
        """Whether the value ends at the `<` there; None while that is open, and never when the answer has ended."""
        own_line = self._held[at - 1] == "\n" if at else self._value_begins
        closes = matches(self._held, at, PARAMETER_END)
        found = [one_of(self._held, at + len(PARAMETER_END), (PARAMETER, FUNCTION_END, CALL_END)) if closes else closes]
        if own_line:
            others = self._tool.parameters.keys() - self._given
            found += [matches(self._held, at, f"{PARAMETER}{name}>") for name in others]
            for tag, behind in ((FUNCTION_END, CALL_END), (CALL_END, CALL)):
                closes = matches(self._held, at, tag)
                found.append(one_of(self._held, at + len(tag), (behind,)) if closes else closes)
        if True in found:
            return True
        if None not in found:
            return False
        # At the end of the answer a closing tag with nothing, or the beginning of a tag, behind it closes.
        return any(self._held.startswith(tag, at) for tag in (PARAMETER_END, FUNCTION_END, CALL_END)) if ended else None

    def _part_of_value(self, text: str) -> Iterator[CallEvent]:
        if self._value is not None and (piece := self._value.push(text)):
            yield CallArguments(self.calls - 1, piece)

    def _end_value(self, text: str) -> Iterator[CallEvent]:
        yield from self._part_of_value(text)
        if self._value is not None:
            yield CallArguments(self.calls - 1, self._value.end())
            self._value = None

    def _end_call(self) -> Iterator[CallEvent]:
        self._in = _In.BLOCK
        yield CallArguments(self.calls - 1, "}" if self._given else "{}")
        yield CallEnded(self.calls - 1)

    def _in_object(self, ended: bool) -> Iterator[CallEvent]:
        end = self._object.find(self._held)
        if end is None:
            return
        call = _json_call(self._held[:end])
        if call is None:
            held, self._held, self._in = self._held, self._held[end:], _In.TEXT
            yield from self._text(CALL + held[:end])
            return
        self._held, self._in = self._held[end:], _In.BLOCK
        self.calls += 1
        self._behind_call = True
        name, arguments = call
        yield CallStarted(self.calls - 1, self._new_id(), name)
        yield CallArguments(self.calls - 1, json.dumps(arguments, ensure_ascii=False))
        yield CallEnded(self.calls - 1)


class _Value:
    """One argument as JSON, in pieces."""

    def __init__(self, types: frozenset[str]) -> None:
        self._types = types
        self._streams, self._begun, self._text = is_text(types), False, ""

    def push(self, text: str) -> str:
        """The JSON that `text` makes certain."""
        self._text += text
        # A text that cannot become null is a string where those two are allowed.
        if self._types == {STRING, NULL} and not any(word.startswith(self._text.strip()) for word in ("null", "None")):
            self._streams = True
        if not self._streams or not self._text:
            return ""
        piece = ("" if self._begun else '"') + json.dumps(self._text, ensure_ascii=False)[1:-1]
        self._begun, self._text = True, ""
        return piece

    def end(self) -> str:
        if self._begun:
            return '"'
        return json.dumps("" if self._streams else typed_value(self._text, self._types), ensure_ascii=False)


class _ObjectEnd:
    """Finds the end of a JSON object in text that grows."""

    def __init__(self) -> None:
        self._at, self._depth, self._in_string = 0, 0, False

    def find(self, text: str) -> int | None:
        """The position behind its last brace, or of a `</tool_call>` before it; None while neither is there."""
        while self._at < len(text):
            char = text[self._at]
            if self._in_string:
                if char == "\\":
                    if self._at + 1 == len(text):
                        return None
                    self._at += 1
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char == "<":
                closes = matches(text, self._at, CALL_END)
                if closes is not False:
                    return self._at if closes else None
            elif char in "{}":
                self._depth += 1 if char == "{" else -1
                if not self._depth:
                    return self._at + 1
            self._at += 1
        return None


def _json_call(text: str) -> tuple[str, dict[str, Any]] | None:
    try:
        call = parse_json(text)
        arguments = call.get("arguments", call.get("parameters", {}))
        arguments = parse_json(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return None
    name = call.get("name")
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None
