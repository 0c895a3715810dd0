"""Tool calls are the same however the answer is cut, typed by their schemas, and never lost."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_export.runtimes.text.chat_template import ChatTemplate
from qwen_export.runtimes.text.reasoning import Content
from qwen_export.runtimes.text.tool_calls import CallArguments, CallEnded, CallStarted, ToolCallParser
from tests.support.templates import family_template

DATA = json.loads((Path(__file__).parent / "data" / "tool_calls.json").read_text(encoding="utf-8"))
TOOLS = DATA["tools"]


def parse(pieces: list[str], tools: Any = TOOLS, complete: bool = True) -> tuple[str, list[dict[str, Any]]]:
    """Content, and per call its name, the text of its arguments and whether it ended."""
    parser = ToolCallParser(tools)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.flush(complete)
    content, calls = "", []
    for event in events:
        match event:
            case Content(text):
                assert text
                content += text
            case CallStarted(index, name=name):
                assert index == len(calls) and all(call["ended"] for call in calls)
                calls.append({"name": name, "text": "", "ended": False})
            case CallArguments(index, text):
                assert index == len(calls) - 1 and not calls[index]["ended"]
                calls[index]["text"] += text
            case CallEnded(index):
                calls[index]["ended"] = True
    assert parser.calls == len(calls)
    return content, calls


@pytest.mark.parametrize("case", DATA["cases"], ids=lambda case: case["name"])
def test_calls_whole_and_by_characters(case: dict[str, Any]) -> None:
    tools, complete = (TOOLS if case.get("tools", True) else None), case.get("complete", True)
    text = case["text"]
    for pieces in ([text], list(text), [text[i : i + 7] for i in range(0, len(text), 7)]):
        content, calls = parse(pieces, tools, complete)
        assert content == case.get("content", "")
        assert [call["name"] for call in calls] == [call["name"] for call in case.get("calls", [])]
        for call, expected in zip(calls, case.get("calls", []), strict=True):
            if "cut" in expected:
                assert (call["text"], call["ended"]) == (expected["cut"], False)
            else:
                assert (
                    json.dumps(json.loads(call["text"]), sort_keys=True) == json.dumps(expected["arguments"], sort_keys=True)
                    and call["ended"]
                )


PARTS = [
    "<tool_call>", "</tool_call>", "<function=", "<function=ping>", "<function=save_file>", "<function=book>", "</function>", "<parameter=",
    "<parameter=file>", "<parameter=text>", "<parameter=mode>", "<parameter=seats>", "</parameter>", "\n", "\n\n", " ", "<", ">", "null",
    "a", '"', "\\", '{"name": "ping", "arguments": {}}', "{", "}", "<tool", "</para", "7",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=24), st.booleans(), st.data())
def test_result_does_not_depend_on_the_cuts(parts: list[str], complete: bool, data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse([text], complete=complete)
    assert parse(pieces, complete=complete) == whole
    assert parse(list(text), complete=complete) == whole
    for call in whole[1]:
        assert call["ended"] or not complete
        if call["ended"]:
            assert isinstance(json.loads(call["text"]), dict)


@cache
def template() -> ChatTemplate:
    return ChatTemplate(family_template("3.6"))


VALUES = st.text(st.sampled_from('ab <>/\n"\\é😀{}='), max_size=20)


@settings(max_examples=200, deadline=None)
@given(VALUES, VALUES, st.integers(-(10**6), 10**6), st.booleans(), st.lists(st.none() | st.booleans() | VALUES, max_size=3))
def test_what_the_template_writes_is_read_back(file: str, text: str, seats: int, window: bool, stops: list[Any]) -> None:
    calls = [
        {"name": "save_file", "arguments": {"file": file, "text": text}},
        {"name": "book", "arguments": {"seats": seats, "window": window, "stops": stops}},
    ]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "One moment.", "tool_calls": calls}]
    rendered = template().render(messages, TOOLS, add_generation_prompt=False)
    answer = rendered[rendered.rindex("</think>\n\n") + len("</think>\n\n") : rendered.rindex("<|im_end|>")]
    content, found = parse([answer])
    assert content == "One moment."
    assert [{"name": call["name"], "arguments": json.loads(call["text"])} for call in found] == calls


def test_texts_stream_and_ids_are_unique() -> None:
    parser = ToolCallParser(TOOLS)
    begin = parser.push("<tool_call>\n<function=save_file>\n<parameter=text>\nfirst")
    assert [type(event) for event in begin] == [CallStarted, CallArguments, CallArguments]
    assert begin[1:] == [CallArguments(0, '{"text": '), CallArguments(0, '"first')]
    assert parser.push(" line\nsecond") == [CallArguments(0, " line\\nsecond")]
    assert parser.push("\n<") == []
    assert parser.push("b>") == [CallArguments(0, "\\n<b>")]
    end = parser.push("\n</parameter>\n</function>\n</tool_call>")
    assert end == [CallArguments(0, '"'), CallArguments(0, "}"), CallEnded(0)]
    (again, *_) = parser.push("<tool_call><function=ping>")
    assert isinstance(begin[0], CallStarted) and isinstance(again, CallStarted)
    assert again.index == 1 and again.id != begin[0].id
    assert begin[0].id.startswith("call_") and len(begin[0].id) == 29


def test_a_long_value_costs_no_more_per_piece() -> None:
    parser = ToolCallParser(TOOLS)
    parser.push("<tool_call>\n<function=save_file>\n<parameter=text>\n")
    for _ in range(20_000):
        (event,) = parser.push("x < y\n<z> ")
        assert isinstance(event, CallArguments) and len(event.text) < 30
