"""Reasoning and answer are the same however the stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_export.runtimes.text.reasoning import Content, Event, Reasoning, ReasoningSplitter, split_reasoning

# starts_in_reasoning, text, reasoning, content
CASES = [
    (True, "Let me see.\n</think>\n\nFour.", "Let me see.", "Four."),
    (True, "\n</think>\n\nFour.", "", "Four."),
    (True, "</think>Four.", "", "Four."),
    (True, "still thinking, then out of tok", "still thinking, then out of tok", ""),
    (True, "<think>\nopened again\n</think>\n\nok", "opened again", "ok"),
    (True, "a\n\nb\n\n\n</think>\n\nline\n\nline\n", "a\n\nb", "line\n\nline\n"),
    (True, "is </thin a tag? </thinker>\n</think>\n\nno", "is </thin a tag? </thinker>", "no"),
    (True, "x</think>\n\nThe tag </think> closes <think>.", "x", "The tag </think> closes <think>."),
    (False, "Four.", "", "Four."),
    (False, "<think>\n\n</think>\n\nFour.", "", "Four."),
    (False, "\n<think>\nhm\n</think>\n\nFour.", "hm", "Four."),
    (False, "The tag <think> opens, </think> closes.", "", "The tag <think> opens, </think> closes."),
    (False, "\n\nindented answer\n", "", "\n\nindented answer\n"),
    (False, "<th", "", "<th"),
    (False, "<thinking>", "", "<thinking>"),
    (True, "x\n\n</thi", "x\n\n</thi", ""),
    (True, "", "", ""),
    (True, "I call it.\n<tool_call>\n<function=f>\n</function>", "I call it.", "<tool_call>\n<function=f>\n</function>"),
    (True, "<tool_call><function=f>", "", "<tool_call><function=f>"),
    (True, "I could use <tool_call> here.\n</think>\n\nNo.", "I could use <tool_call> here.", "No."),
    (True, "<tool_call>\n<func", "<tool_call>\n<func", ""),
    (True, "a\n</think>\n\n</think>\n\nb </think>", "a", "b </think>"),
    (True, "a</think></think></think>b", "a", "</think>b"),
    (True, "a</think>\n</th", "a", "</th"),
]


def run(pieces: list[str], starts: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(starts)
    events: list[Event] = [event for piece in pieces for event in splitter.push(piece)] + splitter.flush()
    kinds = [type(event) for event in events]
    assert kinds == sorted(kinds, key=[Reasoning, Content].index), "reasoning after content"
    assert all(event.text for event in events), "an empty event"
    joined = {kind: "".join(event.text for event in events if isinstance(event, kind)) for kind in (Reasoning, Content)}
    return joined[Reasoning], joined[Content]


@pytest.mark.parametrize(("starts", "text", "reasoning", "content"), CASES)
def test_split(starts: bool, text: str, reasoning: str, content: str) -> None:
    assert split_reasoning(text, starts) == (reasoning, content)
    assert run(list(text), starts) == (reasoning, content)


@given(
    st.booleans(),
    st.lists(
        st.sampled_from(["<think>", "</think>", "\n", "<", "</th", "ink>", "think", "a ", "<tool_call>", "<function=", "<tool"]), max_size=9
    ),
    st.data(),
)
def test_result_does_not_depend_on_the_cuts(starts: bool, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(pieces, starts) == split_reasoning(text, starts)


def test_text_is_given_out_at_once_unless_it_may_be_a_tag() -> None:
    splitter = ReasoningSplitter(starts_in_reasoning=True)
    assert splitter.push("Hm") == [Reasoning("Hm")]
    assert splitter.push(", 1 <") == [Reasoning(", 1 ")]
    assert splitter.push(" 2") == [Reasoning("< 2")]
    assert splitter.push("\n</") == []
    assert splitter.push("think>") == []
    assert not splitter.in_reasoning
    assert splitter.push("\n\n") == []
    assert splitter.push("Yes </") == [Content("Yes </")]


def test_without_tools_a_call_is_text_of_the_reasoning() -> None:
    text = "I would write\n<tool_call>\n<function=f>\n</think>\n\nNo."
    assert split_reasoning(text, True, tool_calls=False) == ("I would write\n<tool_call>\n<function=f>", "No.")
