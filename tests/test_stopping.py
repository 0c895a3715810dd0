"""Stop ids of incomplete checkpoints, stop strings across tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from qwen_export.errors import QwenExportError
from qwen_export.runtimes.text.stopping import StopStrings, stop_ids
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer


def tokenizer_with(*tokens: str) -> TextTokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.add_special_tokens([AddedToken(token) for token in tokens])
    return TextTokenizer(tokenizer)


def test_stop_ids_are_those_of_the_family_and_of_the_tokenizer() -> None:
    tokenizer = tokenizer_with("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert stop_ids(tokenizer) == {0, 2}
    assert stop_ids(tokenizer, "<|im_start|>") == {0, 1, 2}
    assert stop_ids(tokenizer_with("a"), None) == stop_ids(tokenizer_with("a"), "<|end|>") == frozenset()


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    stopper = StopStrings(stops)
    text = "".join(stopper.push(piece) for piece in pieces) + stopper.flush()
    return text, stopper.matched


def test_stop_string_spanning_pieces_is_cut_off() -> None:
    stopper = StopStrings(["\nUser:", "END"])
    assert stopper.push("Hello E") == "Hello "
    assert stopper.push("N") == ""
    assert stopper.push("Dless") == "" and stopper.matched == "END"
    assert stopper.push("more") == stopper.flush() == ""


def test_partial_match_is_given_back() -> None:
    assert run(["END"], ["the EN", "trance", " EN"]) == ("the ENtrance EN", None)
    assert run([], ["a", "b"]) == ("ab", None)


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.lists(st.text("abc", max_size=4), max_size=6))
def test_result_does_not_depend_on_the_cuts(stops: list[str], pieces: list[str]) -> None:
    text, matched = run(stops, pieces)
    assert (text, matched) == run(stops, ["".join(pieces)]) == run(stops, list("".join(pieces)))
    assert not any(stop in text for stop in stops) and "".join(pieces).startswith(text + (matched or ""))


@pytest.mark.parametrize("stops", ["END", [""], [1]])
def test_unusable_stop_strings(stops: object) -> None:
    with pytest.raises(QwenExportError, match="not usable"):
        StopStrings(stops)  # type: ignore[arg-type]
