"""An assistant's message last is continued, as transformers' `continue_final_message` does; no second turn is opened behind it."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_export.errors import ParameterError, TemplateError
from qwen_export.runtimes.text.chat_prompt import chat_prompt
from qwen_export.runtimes.text.chat_template import ChatTemplate
from qwen_export.runtimes.text.text_files import TextFiles
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer
from tests.support.templates import family_template
from tests.support.text_files import DEMO

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
USER = {"role": "user", "content": "Capital of Norway?"}
ENDS = ["The capital is", "The capital is ", "Two\n\n", " x", "<think>\nhm\n</think>\n\nThe", [{"type": "text", "text": "The capital"}]]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextFiles(DEMO).tokenizer


@pytest.mark.parametrize("content", ENDS, ids=repr)
@pytest.mark.parametrize("source", [family_template("3.5"), family_template("3.6"), CHATML], ids=["3.5", "3.6", "chatml"])
@pytest.mark.parametrize("thinking", [None, True, False])
def test_the_prompt_is_that_of_transformers(tokenizer: TextTokenizer, content: Any, source: str, thinking: bool | None) -> None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    if source == CHATML and isinstance(content, list):
        pytest.skip("the template takes texts only")
    messages = [USER, {"role": "assistant", "content": content}]
    options = {} if thinking is None else {"enable_thinking": thinking}
    (expected,), _ = render([messages], chat_template=source, continue_final_message=True, **options)
    prompt = chat_prompt(messages, ChatTemplate(source), tokenizer, enable_thinking=thinking)
    assert tokenizer.decode(prompt.ids) == expected
    assert prompt.ids == tokenizer.encode(expected)
    assert not prompt.thinking


def test_reasoning_can_be_continued(tokenizer: TextTokenizer) -> None:
    messages = [USER, {"role": "assistant", "content": "", "reasoning_content": "Norway has"}]
    template = ChatTemplate(family_template("3.6"))
    prompt = chat_prompt(messages, template, tokenizer, continue_final_message="reasoning_content")
    assert tokenizer.decode(prompt.ids).endswith("<think>\nNorway has")
    assert prompt.thinking


def test_what_comes_before_the_message_is_marked_for_reuse(tokenizer: TextTokenizer) -> None:
    template = ChatTemplate(family_template("3.6"))
    prompt = chat_prompt([USER, {"role": "assistant", "content": "The"}], template, tokenizer)
    assert prompt.mark_at is not None
    assert tokenizer.decode(prompt.ids[: prompt.mark_at]) == template.render([USER], add_generation_prompt=False)


def test_a_finished_turn_is_refused(tokenizer: TextTokenizer) -> None:
    template = ChatTemplate(family_template("3.6"))
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(ParameterError, match=r"nothing to answer.*tool results"):
        chat_prompt([USER, call], template, tokenizer)
    with pytest.raises(ParameterError, match=r"nothing to answer.*continue_final_message=True"):
        chat_prompt([USER, {"role": "assistant", "content": "Oslo."}], template, tokenizer, continue_final_message=False)


def test_a_message_that_cannot_be_continued_is_one_message(tokenizer: TextTokenizer) -> None:
    messages = [USER, {"role": "assistant", "content": "The"}]
    with pytest.raises(TemplateError, match="drops the message that is to be continued"):
        chat_prompt(messages, ChatTemplate("{{ messages[0].content }}"), tokenizer)
    with pytest.raises(TemplateError, match="no text to continue"):
        chat_prompt(messages, ChatTemplate(CHATML), tokenizer, continue_final_message="reasoning_content")
