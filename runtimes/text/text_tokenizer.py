"""Text to token ids, with a line between the template's control tokens and text that only looks like them.

Three ways to encode:

`encode(text)`        parses added tokens (`<|im_start|>`, `<think>`, ...) wherever they stand. For rendered chats and raw prompts.
`encode_plain(text)`  parses none: `<|im_end|>` in the text becomes the letters `<`, `|`, `im`, ... For a text that is data as a whole.
`shield(text)`        marks every control token in a text as plain, and `encode` later honors the marks. For the parts of a chat that
                      come from outside, *before* the template puts control tokens around them (`shielding.py`): a message can then
                      not end its own turn and open another.

Control tokens are the special tokens, the added tokens that the template's source holds, and the family's tags. Other added tokens are
words that a fine-tune gave the vocabulary (`tokenizer.add_tokens`): they stay tokens in every text, as the model was trained on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qwen_export.errors import BundleError, ParameterError, QwenExportError

# A Unicode noncharacter (never assigned, not for interchange) behind the first character of a shielded token; a template that escapes
# its JSON to ASCII writes the second form.
_MARK, _ESCAPED_MARK = "\ufdd0", "\\ufdd0"

# Not marked special by the family's tokenizers, so that answers show them.
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


class TextTokenizer:
    """The tokenizer of a checkpoint or bundle.

    `ids` are token ids in `[0, vocab_size)`; the model's head may be wider (248,320 rows for 248,077 tokens), so a sampler needs
    `vocab_size` as its limit. No token is added in front of or behind a text: the family has no BOS.
    """

    def __init__(self, tokenizer: Tokenizer, template: str = "", special: Iterable[str] = ()) -> None:
        """`template`: source of the chat template. `special`: special tokens that only tokenizer_config.json marks as such."""
        self.tokenizer = tokenizer
        # Shares the model's memory; only the added tokens are left behind.
        self._plain = Tokenizer(tokenizer.model)
        if tokenizer.normalizer is not None:
            self._plain.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            self._plain.pre_tokenizer = tokenizer.pre_tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.added: dict[str, int] = {token.content: i for i, token in added.items()}
        self._added_ids = frozenset(added)
        marked_special = {token.content for token in added.values() if token.special} | set(special)
        self.control = frozenset(t for t in self.added if t and (t in marked_special or t in _TAGS or t in template))
        """Added tokens that only the template may write."""
        longest_first = sorted(self.control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        mark = f"(?:{_MARK}|{re.escape(_ESCAPED_MARK)})"
        marked = [f"{re.escape(t[:1])}{mark}{re.escape(t[1:])}" for t in longest_first]
        self._marked_pattern = re.compile("|".join(marked) or "(?!)")

    @classmethod
    def from_file(cls, path: str | Path, template: str = "", special: Iterable[str] = ()) -> TextTokenizer:
        """Read a tokenizer.json (about 0.9 s for the family's). Raises BundleError when it is missing or is not one."""
        if not Path(path).is_file():
            raise BundleError("there is no tokenizer", where=str(path), fix="Copy tokenizer.json from the checkpoint.")
        try:
            return cls(Tokenizer.from_file(str(path)), template, special)
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(
                "the tokenizer cannot be read", where=str(path), got=error, fix="Copy tokenizer.json from the checkpoint again."
            ) from error

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max([self.tokenizer.get_vocab_size(with_added_tokens=False) - 1, *self.added.values()]) + 1

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token."""
        return max(len(token) for token in self.tokenizer.get_vocab())

    def encode(self, text: str, *, parameter: str = "prompt") -> list[int]:
        """Ids of a text whose added tokens count as such, except the shielded ones. Raises ParameterError, with the name of the caller's
        parameter, for a text that is not Unicode: half of a surrogate pair, or bytes of a command line that are not UTF-8."""
        found = _encoding(self.tokenizer, text, parameter)
        if self._marked_pattern.search(text) is None:
            return found.ids
        # The tokenizer itself finds the added tokens between the marks (with the rules of each: whole words, stripped spaces).
        ids: list[int] = []
        start = 0
        for token_id, (begin, end) in zip(found.ids, found.offsets, strict=True):
            if token_id in self._added_ids:
                ids += self._encode_unmarked(text[start:begin])
                ids.append(token_id)
                start = end
        return ids + self._encode_unmarked(text[start:])

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is an added token."""
        return _encoding(self._plain, text, "prompt").ids

    def checked_ids(self, ids: Sequence[int]) -> list[int]:
        """Ids that a caller gives instead of a text. Raises ParameterError for what is not one of this tokenizer."""
        size = self.vocab_size
        wrong = ids if not isinstance(ids, Sequence) or isinstance(ids, bytes) else next((i for i in ids if not _is_id(i, size)), None)
        if wrong is not None:
            raise ParameterError(
                "the prompt is not a text or a list of token ids",
                parameter="prompt",
                got=repr(wrong)[:80],
                expected=f"a text, or a list of integers from 0 to {size - 1}",
                fix="Answer a chat with `stream`.",
            )
        return list(ids)

    def shield(self, text: str) -> str:
        """The text with a mark in every control token, for `encode`. A text without them is returned as it is."""
        return self._control_pattern.sub(lambda match: match.group()[:1] + _MARK + match.group()[1:], text)

    def unshield(self, text: str) -> str:
        """The text without the marks, to show it."""
        return self._marked_pattern.sub(_without_mark, text)

    def decode(self, ids: Sequence[int], *, show_special: bool = True) -> str:
        """The text of whole ids; for one token at a time see `Detokenizer`."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not show_special)

    def id_of(self, token: str) -> int:
        """The id of one token, written as in tokenizer.json. Raises QwenExportError when there is none."""
        token_id = self.find(token)
        if token_id is None:
            raise QwenExportError(
                "the tokenizer has no such token", got=repr(token), fix="Use the tokenizer.json that belongs to this checkpoint."
            )
        return token_id

    def find(self, token: str) -> int | None:
        """The id of one token, or None."""
        token_id: int | None = self.tokenizer.token_to_id(token)
        return token_id

    def _encode_unmarked(self, text: str) -> list[int]:
        return self.encode_plain(self.unshield(text)) if text else []


def _is_id(value: object, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size


def _encoding(tokenizer: Tokenizer, text: str, parameter: str) -> Any:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except TypeError as error:
        at = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None) if isinstance(text, str) else None
        raise ParameterError(
            "the text is not Unicode" if at is not None else "the text cannot be read",
            parameter=parameter,
            got=type(text).__name__ if at is None else f"{text[at]!r} at character {at}",
            fix="Give a text in UTF-8.",
        ) from error


def _without_mark(match: re.Match[str]) -> str:
    text = match.group()
    mark = _MARK if text[1] == _MARK else _ESCAPED_MARK
    return text[0] + text[1 + len(mark) :]
