"""Log probabilities of an answer as OpenAI's protocol has them: a list of tokens for chats, lists side by side for texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen_export.runtimes.structured.answer_events import Candidate, TokenLogprob


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {"content": [{**_named(token), "top_logprobs": [_named(one) for one in token.top]} for token in tokens], "refusal": None}


def text_logprobs(tokens: Sequence[TokenLogprob | None], first: bytes = b"") -> dict[str, Any]:
    """`first`: the bytes of the first token of the prompt, which has no log probability and is None here."""
    offsets, texts = [], b""
    for token in tokens:
        offsets.append(len(texts.decode(errors="ignore")))
        texts += first if token is None else token.text
    return {
        "tokens": [_shown(first if token is None else token.text) for token in tokens],
        "token_logprobs": [None if token is None else token.logprob for token in tokens],
        "top_logprobs": [None if token is None else {_shown(one.text): one.logprob for one in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _named(token: Candidate) -> dict[str, Any]:
    return {"token": _shown(token.text), "logprob": token.logprob, "bytes": list(token.text)}


def _shown(text: bytes) -> str:
    return text.decode(errors="replace")
