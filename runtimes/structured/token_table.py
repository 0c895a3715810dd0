"""The tokens of a bundle as bytes, for the grammars of `llguidance`.

Grammars are over bytes: a token may hold several of their symbols, or a part of one. Control tokens are no text. A grammar names them, such
as `</think>`, and the letters of such a name do not match it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from threading import Lock
from typing import TYPE_CHECKING

from qwen_export.errors import ParameterError, QwenExportError
from qwen_export.extras import needed_for
from qwen_export.runtimes.text.detokenizer import Detokenizer
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

_KEPT = 32
"""Compiled grammars that are kept: the tools of an agent are the same in each of its requests."""


class TokenTable:
    """Made in about a second for the family's 248,077 tokens; later answers share it. Raises MissingExtra without `llguidance`."""

    def __init__(self, tokenizer: TextTokenizer, stop_ids: Collection[int]) -> None:
        """`stop_ids`: tokens that may end an answer."""
        with needed_for("an answer of a given form"):
            from llguidance import LLTokenizer, TokenizerWrapper
        if not stop_ids:
            raise QwenExportError(
                "the tokenizer has no token that ends an answer",
                fix="Build the bundle from a checkpoint whose generation_config.json has eos_token_id.",
            )
        self.stop_ids = frozenset(stop_ids)
        self.words = -(-max(tokenizer.vocab_size, 1 + max(stop_ids)) // 32)
        """Words of 32 bits of a mask."""
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer, self.stop_ids, 32 * self.words)), eos_token=sorted(self.stop_ids)
        )
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def matcher(self, grammar: str, parameter: str) -> LLMatcher:
        """A matcher of a Lark grammar at the start of an answer. Raises ParameterError, for a parameter of the API, where it is not
        one."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is None:
                found = self._compile(grammar, parameter)
                self._compiled[grammar] = found
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return found.deep_copy()

    def _compile(self, grammar: str, parameter: str) -> LLMatcher:
        from llguidance import LLMatcher

        made = LLMatcher(self._tokenizer, grammar, log_level=0)
        if made.is_error():
            raise ParameterError(
                "the answer cannot be held to this",
                parameter=parameter,
                got=_first_line(made.get_error()),
                fix="Use what the grammars of llguidance know.",
            )
        return made


class _Vocabulary:
    """What `TokenizerWrapper` reads of a tokenizer; the names are its own."""

    bos_token_id = None

    def __init__(self, tokenizer: TextTokenizer, stop_ids: frozenset[int], count: int) -> None:
        detokenizer = Detokenizer(tokenizer.tokenizer)
        self.tokens = [detokenizer.bytes_of(token) for token in range(count)]
        self.eos_token_id = min(stop_ids)
        control = {tokenizer.id_of(text) for text in tokenizer.control}
        self.special_token_ids = sorted(control | stop_ids | {token for token, text in enumerate(self.tokens) if not text})
        self._encode = tokenizer.encode_plain

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _first_line(error: str) -> str:
    return next((line.strip() for line in error.splitlines() if line.strip()), "")[:300]
