"""A limit of reasoning: once so many tokens of it are there, and they end with a whole character, only its closing tag may follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwen_export.runtimes.sampling.constraint import Constraint, ForeseeingConstraint
from qwen_export.runtimes.sampling.token_set import TokenSet
from qwen_export.runtimes.text.detokenizer import Detokenizer
from qwen_export.runtimes.text.tag_matching import FUNCTION
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer

Tokens = NDArray[np.int64]
_CLOSING = "\n</think>\n\n"
"""As the template writes the end of reasoning."""


class ThinkingBudget:
    """Of an answer that begins inside its reasoning. `inner` is what it must obey otherwise; its grammar takes the closing tag anywhere in
    the reasoning. With `tools` a call may end the reasoning instead, and nothing is forced into it."""

    def __init__(self, budget: int, tokenizer: TextTokenizer, inner: Constraint | None, *, tools: bool) -> None:
        self._budget, self._inner = budget, inner
        self._foreseeing = inner if isinstance(inner, ForeseeingConstraint) else None
        self._closing = tokenizer.encode(_CLOSING)
        self._close = tokenizer.id_of("</think>")
        self._call = tokenizer.find("<tool_call>") if tools else None
        self._bytes_of = Detokenizer(tokenizer.tokenizer).bytes_of

    def allowed(self, tokens: Tokens) -> TokenSet | NDArray[np.bool_] | None:
        rest = self._rest(tokens)
        if rest:
            return TokenSet.single(rest[0])
        return self._inner.allowed(tokens) if self._inner is not None else None

    def forced(self, tokens: Tokens) -> Sequence[int]:
        return self._rest(tokens) or (self._foreseeing.forced(tokens) if self._foreseeing is not None else ())

    def fitting(self, tokens: Tokens, drafts: Sequence[int]) -> int:
        count = self._foreseeing.fitting(tokens, drafts) if self._foreseeing is not None else len(drafts)
        if len(tokens) + count < self._budget:
            return count
        text = np.concatenate([tokens, np.asarray(drafts, np.int64)])
        for place in range(count):
            rest = self._rest(text[: len(tokens) + place])
            if rest and rest[0] != drafts[place]:
                return place
        return count

    def ahead(self, tokens: Tokens, drafts: Sequence[int]) -> None:
        if self._foreseeing is not None and not self._rest(tokens):
            self._foreseeing.ahead(tokens, drafts)

    def _rest(self, tokens: Tokens) -> list[int]:
        """What is still missing of the closing tag; empty where none is due."""
        count = len(tokens)
        if count < self._budget or (tokens[: self._budget] == self._close).any():
            return []
        for start in range(self._budget, count + 1):
            if start > self._budget and tokens[start - 1] == self._close:
                return []
            calls = self._calls(tokens[:start])
            if calls:
                return []
            if calls is False and self._is_whole(tokens[:start]):
                return self._closing[count - start :] if tokens[start:].tolist() == self._closing[: count - start] else []
        return []

    def _calls(self, tokens: Tokens) -> bool | None:
        """Whether a call ends the reasoning; None while that is open."""
        places = np.flatnonzero(tokens == self._call) if self._call is not None else ()
        found: bool | None = False
        for place in places:
            text = b"".join(map(self._bytes_of, tokens[place + 1 : place + 17].tolist())).decode(errors="replace").lstrip()
            if text.startswith(FUNCTION):
                return True
            found = None if FUNCTION.startswith(text) else found
        return found

    def _is_whole(self, tokens: Tokens) -> bool:
        """Whether the text ends with a whole character."""
        end = b"".join(map(self._bytes_of, tokens[-4:].tolist()))[-4:]
        for back in range(1, min(3, len(end)) + 1):
            byte = end[-back]
            if byte >= 0xC0:  # the first of 2, 3 or 4 bytes
                return back >= (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
            if byte < 0x80:
                return True
        return True
