"""Streaming text equals whole text, for any ids."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from qwen_export.errors import QwenExportError
from qwen_export.runtimes.text.detokenizer import Detokenizer
from tests.support.real_tokenizer import real_tokenizer

TEXTS = [
    "plain ASCII, one byte each",
    "e\u0301 é ñ ß 人力资源 いっぱい 한국어 नमस्ते สวัสดี مرحبا",
    "👩‍👩‍👧‍👦🇩🇪🏳️‍🌈🧑🏽‍🚀\U0001d518\U0001d52b 𓀀𒀀",
    "a real replacement character: \ufffd, and a control: \x00",
    "<|im_start|>assistant\n<think>\nhm\n</think>\n\nok<|im_end|>",
]


def stream(ids: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(real_tokenizer(), **options)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_decoded_text(text: str) -> None:
    tokenizer = real_tokenizer()
    ids = tokenizer.encode(text).ids
    assert "".join(stream(ids)) == tokenizer.decode(ids, skip_special_tokens=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255) | st.integers(0, 248319), max_size=40), st.booleans())
def test_any_ids_also_invalid_utf8_and_padding_ids(ids: list[int], show_special: bool) -> None:
    expected = real_tokenizer().decode(ids, skip_special_tokens=not show_special)
    assert "".join(stream(ids, show_special=show_special)) == expected


def test_a_character_comes_out_with_its_last_byte() -> None:
    ids = real_tokenizer().encode("🧑🏽‍🚀").ids
    pieces = stream(ids)
    assert len(ids) > 4 and "" in pieces[:-1], "the sample must be split inside a character"
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""


def test_answer_cut_inside_a_character() -> None:
    tokenizer = real_tokenizer()
    byte_tokens = [tokenizer.token_to_id(char) for char in "ðŁĺ"]  # three of the four bytes of an emoji
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(i) for i in byte_tokens] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(tokenizer.token_to_id("a")) == "a"


def test_hidden_special_tokens_leave_think_and_tool_tags() -> None:
    ids = real_tokenizer().encode("<|im_start|><think>x</think><tool_call>y</tool_call><|vision_pad|>").ids
    assert "".join(stream(ids, show_special=False)) == "<think>x</think><tool_call>y</tool_call>"


class CountingTokenizer:
    """The real one, and how often each of its methods was called."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(real_tokenizer(), name)
        if not callable(found):
            return found

        def counted(*arguments: Any) -> Any:
            self.calls[name] += 1
            return found(*arguments)

        return counted


def test_cost_per_token_does_not_grow() -> None:
    """A token is looked up once, when it comes, and no list of tokens is decoded."""
    ids = real_tokenizer().encode("Streaming 流式 🚀 ").ids * 40
    tokenizer = CountingTokenizer()
    detokenizer = Detokenizer(cast(Tokenizer, tokenizer))
    tokenizer.calls.clear()
    tracemalloc.start()
    for i in ids:
        detokenizer.push(i)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tokenizer.calls == {"id_to_token": len(ids)}
    assert kept < 10_000, "nothing of the text is kept"


def test_other_kinds_of_tokenizer_are_refused() -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(QwenExportError, match="got Metaspace, expected ByteLevel"):
        Detokenizer(tokenizer)
