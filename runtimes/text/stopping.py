"""When an answer ends: at a stop token, or at a text that the caller named. For the values of `finish` see `decoding/generation.py`."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_export.errors import ParameterError
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer

# A chat turn ends with the first; a plain text, and some chat answers, with the second.
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


def stop_ids(tokenizer: TextTokenizer, eos_token: str | None = None) -> frozenset[int]:
    """Ids of the tokenizer that end an answer: those of `STOP_TOKENS` and of the tokenizer's own `eos_token`.

    The ids in config.json and generation_config.json come on top. No single source is enough: generation_config.json is absent from
    several repositories of the family, config.json names only `<|endoftext|>`, and an answer that runs past `<|im_end|>` goes on to
    invent the user's next turn.
    """
    tokens = (*STOP_TOKENS, *((eos_token,) if eos_token else ()))
    return frozenset(token_id for token in tokens if (token_id := tokenizer.find(token)) is not None)


class StopStrings:
    """Cuts streamed text at the first stop string, which may span any number of tokens.

    Text that may be the beginning of a stop string is held back. The stop string itself is part of the output with `include` only. The
    string that is complete first wins, so the result does not depend on where the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        if isinstance(stops, str) or not isinstance(stops, Sequence) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ParameterError(
                "the stop strings are not usable",
                parameter="stop",
                got=repr(stops),
                expected="a list of non-empty strings",
                fix='Give a list such as ["\\nUser:"].',
            )
        self._stops, self._include = tuple(stops), include
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
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start]
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
