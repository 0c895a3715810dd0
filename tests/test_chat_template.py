"""Rendering equals transformers' rendering; what cannot be rendered is one clear message."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from qwen_export.errors import ParameterError, TemplateError
from qwen_export.runtimes.text.chat_template import ChatTemplate, thinking_prefix
from tests.support.templates import OTHER_TEMPLATE, family_template

VARIANTS = ["3.5", "3.5-small", "3.6", "3.8"]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Weather <now> & \"later\" 'é'", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "clock", "parameters": {"properties": {"zone": {"type": "string"}}}}},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 3, "units": ["C", "<K>"], "raw": None}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [{"role": "user", "content": "  What is 2 + 2?\n"}],
    "system": [{"role": "system", "content": "Be brief. <b>&</b>"}, {"role": "user", "content": "Hi"}],
    "reasoning in content": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nlong\n\nthought\n</think>\n\nAnswer"},
        {"role": "user", "content": "b"},
    ],
    "reasoning apart": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "reasoning_content": "long thought", "content": "Answer"},
        {"role": "user", "content": "b"},
    ],
    "tool loop": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "reasoning_content": "call it", "content": "One moment.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"t": 3}'},
        {"role": "tool", "content": "rain"},
    ],
    "tool loop and answer": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "clock", "arguments": {}}]},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "reasoning_content": "noon", "content": "It is noon."},
    ],
    "parts": [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "What is <think> this?"}]}],
}


def reference(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """transformers' rendering, special tokens included."""
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    (rendered,), _ = render([messages], chat_template=source, **options)
    return rendered


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_family_templates_render_as_in_transformers(variant: str, name: str) -> None:
    source, messages = family_template(variant), CONVERSATIONS[name]
    template = ChatTemplate(source)
    for tools, prompt, thinking, preserve in itertools.product((None, TOOLS), (True, False), (None, True, False), (None, True, False)):
        given = {"enable_thinking": thinking, "preserve_thinking": preserve}
        expected = reference(
            source, messages, tools=tools, add_generation_prompt=prompt, **{k: v for k, v in given.items() if v is not None}
        )
        assert template.render(messages, tools, add_generation_prompt=prompt, **given) == expected


def test_environment_is_that_of_transformers() -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "<b>'x' & \"y\"</b> é"},
        {"role": "skip", "content": ""},
        {"role": "a", "content": [{"text": "é"}], "extra": {"b": 1, "a": [None, True]}},
        {"role": "late", "content": ""},
    ]
    expected = reference(OTHER_TEMPLATE, messages, tools=[], **tokens)
    assert ChatTemplate(OTHER_TEMPLATE, tokens).render(messages, [], add_generation_prompt=False) == expected
    assert "no tools" in expected and "</b>" in expected and "late" not in expected


def test_apply_chat_template_of_a_tokenizer_agrees() -> None:
    """The whole way of transformers: the tokenizer's own special tokens are template variables."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    source = "{{ bos_token }}{{ eos_token }}{{ pad_token }}" + family_template("3.6")
    messages = CONVERSATIONS["tool loop"]
    expected = tokenizer.apply_chat_template(
        messages, tools=TOOLS, chat_template=source, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    template = ChatTemplate(source, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    assert template.render(messages, TOOLS, enable_thinking=False) == expected


def test_default_of_thinking_is_the_templates_own() -> None:
    assert {v: ChatTemplate(family_template(v)).thinks_by_default() for v in VARIANTS} == {
        "3.5": True,
        "3.5-small": False,
        "3.6": True,
        "3.8": True,
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_thinking_prefix_follows_enable_thinking(variant: str) -> None:
    template = ChatTemplate(family_template(variant))
    messages = CONVERSATIONS["parts"]
    assert thinking_prefix(template.render(messages, enable_thinking=True))
    assert not thinking_prefix(template.render(messages, enable_thinking=False))
    assert not thinking_prefix(template.render(messages, add_generation_prompt=False))


def test_thinking_prefix_of_prompts_that_no_template_wrote() -> None:
    assert not thinking_prefix("Once upon a time")
    assert thinking_prefix("<think>\nThe reader continues this")
    assert not thinking_prefix("<think>\nx\n</think>\n\nThe reader continues this")
    assert thinking_prefix("<|im_start|>user\n</think><|im_end|>\n<|im_start|>assistant\n<think>\nPrefilled")


def test_preserve_thinking_keeps_past_reasoning_only_where_the_template_knows_it() -> None:
    messages = CONVERSATIONS["reasoning apart"]
    keeps = {v: "long thought" in ChatTemplate(family_template(v)).render(messages, preserve_thinking=True) for v in VARIANTS}
    assert keeps == {"3.5": False, "3.5-small": False, "3.6": True, "3.8": True}
    default = {v: "long thought" in ChatTemplate(family_template(v)).render(messages) for v in VARIANTS}
    assert default == {"3.5": False, "3.5-small": False, "3.6": False, "3.8": True}


def test_variables_of_one_template_are_passed_on() -> None:
    prompt = ChatTemplate(family_template("3.8")).render(CONVERSATIONS["one question"], reasoning_effort="low")
    assert prompt.startswith("<|im_start|>system\nReasoning effort: low<|im_end|>")


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "system", "content": "x"}], "refused the messages: got There is no user query in the messages."),
        ([USER, {"role": "system", "content": "x"}], "A system message must be the first"),
        ([USER, {"role": "critic", "content": "x"}], "Unknown role critic"),
        ([], "no messages: got an empty list"),
        ("Hello", "a list of messages, not a text: got str"),
        ([USER, "Hello"], r"message cannot be read \(messages\[1\]\): got str"),
        ([{"content": "x"}], r"role cannot be read \(messages\[0\]\): got None"),
        ([{"role": "user"}], "content is missing"),
        ([{"role": "user", "content": 3}], "content cannot be read .*: got int"),
        ([{"role": "user", "content": ["x"]}], "content cannot be read .*: got list"),
        ([{**USER, "reasoning_content": 3}], "reasoning_content cannot be read"),
        ([{**USER, "tool_calls": {}}], "tool_calls cannot be read"),
        ([{**USER, "tool_calls": [{"function": {}}]}], r"tool call cannot be read \(messages\[0\].tool_calls\[0\]\)"),
    ],
)
def test_refusals_are_one_message(messages: Any, message: str) -> None:
    with pytest.raises((TemplateError, ParameterError), match=message) as caught:
        ChatTemplate(family_template("3.5")).render(messages)
    assert "\n" not in str(caught.value)


def test_broken_template_names_the_line() -> None:
    with pytest.raises(TemplateError, match=r"not valid Jinja \(line 2\)"):
        ChatTemplate("ok\n{% if %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ ''.__class__ }}{{ messages.append(1) }}",
        "{{ range(10 ** 9) | list }}",
        "{{ '{0.__class__}'.format(messages)[0].missing.x }}",
    ],
)
def test_template_cannot_leave_the_sandbox(source: str) -> None:
    messages = [dict(USER)]
    with pytest.raises(TemplateError, match=r"refused|too much"):
        ChatTemplate(source).render(messages)
    assert messages == [USER]
