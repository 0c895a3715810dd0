"""Messages as people and protocols write them: rendered as meant, or refused with one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_export.errors import ParameterError, TemplateError
from qwen_export.runtimes import Model, load
from qwen_export.runtimes.text.chat_prompt import ChatPrompt, chat_prompt
from qwen_export.runtimes.text.chat_template import ChatTemplate
from qwen_export.runtimes.text.text_files import TextFiles
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer
from tests.support.templates import family_template
from tests.support.text_files import DEMO

VARIANTS = ["3.5", "3.6", "3.8"]
USER = {"role": "user", "content": "Weather in Oslo?"}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextFiles(DEMO).tokenizer


def text(tokenizer: TextTokenizer, messages: Any, template: str = "3.6", **options: Any) -> str:
    source = template if "{" in template else family_template(template)
    prompt: ChatPrompt = chat_prompt(messages, ChatTemplate(source), tokenizer, **options)
    return tokenizer.decode(prompt.ids)


def called(arguments: Any, **call: Any) -> list[dict[str, Any]]:
    function = {"name": "weather", "arguments": arguments} | call
    return [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_arguments_as_json_text_render_as_the_mapping(variant: str) -> None:
    template = ChatTemplate(family_template(variant))
    expected = template.render(called({"city": "Oslo", "days": 3}))
    assert template.render(called('{"city": "Oslo", "days": 3}')) == expected
    flat = called({})
    flat[1]["tool_calls"] = [{"name": "weather", "arguments": '{"city": "Oslo", "days": 3}'}]
    assert template.render(flat) == expected


@pytest.mark.parametrize("arguments", ["", "{", '{"city": "Os', "[1]", "7", "null", None, "NaN", "[" * 100_000])
def test_arguments_that_are_no_object_are_a_call_without_arguments(arguments: Any) -> None:
    template = ChatTemplate(family_template("3.6"))
    assert template.render(called(arguments)) == template.render(called({}))


def test_templates_that_write_arguments_as_text_get_the_text() -> None:
    one = "c.function.arguments"
    source = f"{{% for c in messages[1].tool_calls %}}{{{{ {one} if {one} is string else {one} | tojson }}}}{{% endfor %}}"
    assert ChatTemplate(source).render(called('{"city":"Oslo"}')) == '{"city":"Oslo"}'
    assert ChatTemplate(source).render(called({"city": "Oslo"})) == '{"city": "Oslo"}'


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "cat.png"},
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "input_image", "image_url": "data:"},
        {"type": "video", "video": "a.mp4"},
        {"type": "input_audio", "input_audio": {"data": ""}},
        {"type": "file", "file": {"file_id": "f"}},
        {"image": "cat.png"},
    ],
    ids=str,
)
@pytest.mark.parametrize("role", ["user", "tool", "system"])
def test_parts_that_are_no_text_are_refused(tokenizer: TextTokenizer, part: dict[str, Any], role: str) -> None:
    messages = [USER, {"role": role, "content": [{"type": "text", "text": "What is this?"}, part]}]
    with pytest.raises(ParameterError, match=r"something else than text.*messages\[1\].content\[1\]") as caught:
        text(tokenizer, messages)
    assert caught.value.parameter == "messages" and caught.value.fix


def test_a_picture_is_refused_by_the_model(demo_bundle: Path) -> None:
    model: Model = load(demo_bundle, speculate="off")
    with pytest.raises(ParameterError, match="something else than text"):
        model.stream([{"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What?"}]}])
    with pytest.raises(ParameterError, match=r"a list of messages, not a text.*complete"):
        model.stream("hello")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="the prompt is not a text"):
        model.complete([{"role": "user", "content": "hello"}])  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": 3}, {"type": "thing"}, {"type": 7, "text": "a"}, {}], ids=str)
def test_parts_that_cannot_be_read_are_refused(tokenizer: TextTokenizer, part: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="a part of the content cannot be read"):
        text(tokenizer, [{"role": "user", "content": [part]}])


def test_all_forms_of_text_parts_are_texts(tokenizer: TextTokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, {"type": "output_text", "text": "c"}, {"text": "d"}]
    parts.append({"type": "refusal", "refusal": "e"})
    assert text(tokenizer, [{"role": "user", "content": parts}]) == text(tokenizer, [{"role": "user", "content": "abcde"}])


@pytest.mark.parametrize("variant", VARIANTS)
def test_missing_and_null_content_is_empty(tokenizer: TextTokenizer, variant: str) -> None:
    expected = text(tokenizer, called({}), variant)
    messages = called({})
    del messages[1]["content"]
    assert text(tokenizer, messages, variant) == expected
    messages[1]["content"] = ""
    assert text(tokenizer, messages, variant) == expected
    assert "None" not in text(tokenizer, [{"role": "user", "content": None}], CHATML)


def test_reasoning_by_either_name(tokenizer: TextTokenizer) -> None:
    def chat(name: str) -> list[dict[str, Any]]:
        messages = called({})
        messages[1][name] = "I look it up."
        return messages

    assert text(tokenizer, chat("reasoning")) == text(tokenizer, chat("reasoning_content"))
    assert "I look it up." in text(tokenizer, chat("reasoning"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_developer_messages_and_several_system_messages_become_the_first_system_message(tokenizer: TextTokenizer, variant: str) -> None:
    expected = text(tokenizer, [{"role": "system", "content": "A\n\nB"}, USER], variant)
    for roles in (("system", "developer"), ("developer", "system"), ("developer", "developer"), ("system", "system")):
        messages = [{"role": role, "content": content} for role, content in zip(roles, "AB", strict=True)]
        assert text(tokenizer, [*messages, USER], variant) == expected


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_late_system_message_becomes_a_user_turn(tokenizer: TextTokenizer, role: str) -> None:
    late = [USER, {"role": "assistant", "content": "Rain."}, {"role": role, "content": "Be brief."}, USER]
    expected = [*late[:2], {"role": "user", "content": "Be brief."}, USER]
    assert text(tokenizer, late) == text(tokenizer, expected)


def test_templates_that_take_late_system_and_developer_messages_get_them(tokenizer: TextTokenizer) -> None:
    messages = [USER, {"role": "system", "content": "Be brief."}, USER]
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text(tokenizer, messages, CHATML)
    knows = CHATML + "{% if messages[0].role == 'developer' %}{% endif %}"
    assert "<|im_start|>developer\nA" in text(tokenizer, [{"role": "developer", "content": "A"}, USER], knows)


def test_no_late_system_message_is_dropped(tokenizer: TextTokenizer) -> None:
    drops = "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    assert "Be brief." in text(tokenizer, [USER, {"role": "system", "content": "Be brief."}], drops)


def test_function_results_are_tool_results_in_the_order_of_their_calls(tokenizer: TextTokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    calls = {"role": "assistant", "content": "", "tool_calls": [{**call, "id": "one"}, {**call, "id": "two"}]}
    one, two = ({"role": "tool", "content": name, "tool_call_id": name} for name in ("one", "two"))
    expected = text(tokenizer, [USER, calls, one, two])
    assert text(tokenizer, [USER, calls, two, one]) == expected
    assert text(tokenizer, [USER, calls, {**one, "role": "function"}, two]) == expected
    strange = {**two, "tool_call_id": "three"}
    assert text(tokenizer, [USER, calls, strange, one]).index("two") < text(tokenizer, [USER, calls, strange, one]).rindex("one")


def test_template_variables(tokenizer: TextTokenizer) -> None:
    assert "Reasoning effort: low" in text(tokenizer, [USER], "3.8", template_kwargs={"reasoning_effort": "low"})
    off = text(tokenizer, [USER], template_kwargs={"enable_thinking": False})
    assert off == text(tokenizer, [USER], enable_thinking=False) != text(tokenizer, [USER])


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"template_kwargs": {"reasoning_effort": "low"}}, "template_kwargs"),
        ({"template_kwargs": {"messages": []}}, "template_kwargs"),
        ({"template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, "template_kwargs"),
        ({"template_kwargs": ["a"]}, "template_kwargs"),
        ({"enable_thinking": "no"}, "enable_thinking"),
        ({"tools": {"name": "f"}}, "tools"),
        ({"tools": ["f"]}, "tools"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_values_that_would_have_no_effect_or_a_wrong_one_are_refused(
    tokenizer: TextTokenizer, options: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(ParameterError) as caught:
        text(tokenizer, [USER], "3.5", **options)
    assert caught.value.parameter == parameter and caught.value.fix


def test_the_templates_own_refusal_stays(tokenizer: TextTokenizer) -> None:
    with pytest.raises(TemplateError, match="no user query"):
        text(tokenizer, [{"role": "system", "content": "A"}, {"role": "tool", "content": "x"}])


@pytest.mark.parametrize("content", ["half \ud83d", "bytes \udcff"])
def test_text_that_is_not_unicode_is_refused(tokenizer: TextTokenizer, content: str) -> None:
    with pytest.raises(ParameterError, match="not Unicode") as caught:
        text(tokenizer, [{"role": "user", "content": content}])
    assert caught.value.parameter == "messages"
    with pytest.raises(ParameterError, match="not Unicode") as caught:
        tokenizer.encode(content)
    assert caught.value.parameter == "prompt"
