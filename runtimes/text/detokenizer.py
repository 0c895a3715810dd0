"""Token ids to text, one token at a time.

A byte-level token is a run of bytes, not of characters: an emoji is often three tokens, none of which is text on its own. Each token is
therefore turned into its bytes and an incremental UTF-8 decoder gives out characters as they become complete. The cost of a token does
not depend on how many came before it. (`tokenizers.decoders.DecodeStream` decodes a window of ids instead, waits for as long as the
text ends in U+FFFD, which a model may well mean, and cannot be flushed.)
"""

from __future__ import annotations

import codecs

from tokenizers import Tokenizer, decoders

from qwen_export.errors import QwenExportError


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


class Detokenizer:
    """Streams the text of generated ids; one object per answer.

    The texts returned by `push` and the final `flush`, joined, equal `tokenizer.decode(ids, skip_special_tokens=not show_special)`.
    Bytes that are not UTF-8 come out as U+FFFD once it is certain that they are not; ids outside the vocabulary have no text.

    With `show_special=False`, tokens that the tokenizer marks special (`<|im_end|>`, `<|image_pad|>`, ...) have no text either. `<think>`,
    `<tool_call>` and their closing tags are added tokens that are not marked special: they are shown in both modes, and the reasoning and
    tool parsers need them.
    """

    def __init__(self, tokenizer: Tokenizer, *, show_special: bool = True) -> None:
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise QwenExportError(
                "the tokenizer's text cannot be streamed",
                where="tokenizer.json, decoder",
                got=type(tokenizer.decoder).__name__,
                expected="ByteLevel",
                fix="Use the tokenizer.json of the checkpoint's own family.",
            )
        self._tokenizer = tokenizer
        self._hidden = frozenset() if show_special else frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is still missing bytes."""
        return "" if token_id in self._hidden else self._utf8.decode(self.bytes_of(token_id))

    def flush(self) -> str:
        """What is left at the end of the answer: U+FFFD for a character that was never completed. The object can then be used again."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one token, whether it is shown or not; none of an id outside the vocabulary."""
        token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        try:
            return bytes([BYTE_OF_CHAR[char] for char in token])
        except KeyError:  # an added token in plain text, such as one with a space in it
            return token.encode()
