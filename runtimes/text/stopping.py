"""When an answer ends: at a stop token, or at a text that the caller named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_export.errors import QwenExportError
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer

# A chat turn ends with the first; a plain text, and some chat answers, with the second.
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


def stop_ids(
    tokenizer: TextTokenizer, generation_config: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None
) -> frozenset[int]:
    """All ids that end an answer.

    The union of `eos_token_id` in generation_config.json and in config.json (also in its text_config; an int or a list each), and of
    `STOP_TOKENS`. No single source is enough: generation_config.json is absent from several repositories of the family, config.json names
    only `<|endoftext|>`, and an answer that runs past `<|im_end|>` goes on to invent the user's next turn.
    """
    sources = [generation_config or {}, config or {}]
    text_config = sources[1].get("text_config")
    if isinstance(text_config, Mapping):
        sources.append(text_config)
    ids = {token_id for token in STOP_TOKENS if (token_id := tokenizer.find(token)) is not None}
    for source in sources:
        value = source.get("eos_token_id")
        values = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in values:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise QwenExportError("A stop token is not a token id", where="eos_token_id", got=repr(token_id), expected="an integer")
            ids.add(token_id)
    return frozenset(ids)


class StopStrings:
    """Cuts streamed text at the first stop string, which may span any number of tokens.

    Text that may be the beginning of a stop string is held back. The stop string itself is not part of the output. The string that is
    complete first wins, so the result does not depend on where the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise QwenExportError("The stop strings are not usable", where="stop", got=repr(stops), expected="a list of non-empty strings")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; generation should end and nothing more be pushed."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """The text that is certainly part of the output; after a stop string always empty."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back when the answer ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
