"""Answers of /v1/completions: chunks and whole, with the prompt in front where it is asked for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from qwen_export.runtimes.server.answer_choices import Choice, Choices, Piece
from qwen_export.runtimes.server.chunk_writer import ChunkWriter
from qwen_export.runtimes.server.completion_request import CompletionBody
from qwen_export.runtimes.server.wire_json import dump, new_id, quoted, shown
from qwen_export.runtimes.structured.answer_events import TokenLogprob
from qwen_export.runtimes.text.reasoning import Content


class _Text:
    """The text of one choice as it grows, and where each of its tokens begins in it."""

    def __init__(self, choice: Choice, body: CompletionBody, prompt: str) -> None:
        self._choice, self._body = choice, body
        self._prompt = prompt if body.echo else ""
        self._offset = 0
        self._begun = False

    def add(self, piece: Piece) -> tuple[str, dict[str, list[Any]] | None]:
        """Text and log probabilities of a piece; the first has those of the prompt."""
        text = "" if self._body.only_prompt else "".join(event.text for event in piece.events if isinstance(event, Content))
        tokens: list[TokenLogprob | None] = [] if self._body.only_prompt else list(piece.tokens)
        if self._prompt and not self._begun:
            text = self._prompt + text
            tokens[:0] = self._choice.prompt_logprobs
        self._begun = True
        return text, self._lists(tokens) if tokens else None

    def _lists(self, tokens: Sequence[TokenLogprob | None]) -> dict[str, list[Any]]:
        """The first token of a prompt has no log probability, and comes as None."""
        made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            prepared = self._choice.prepared
            text = shown(prepared.detokenizer.bytes_of(prepared.request.ids[0]) if token is None else token.text)
            made["tokens"].append(text)
            made["token_logprobs"].append(None if token is None else token.logprob)
            made["top_logprobs"].append(None if token is None else {shown(other.text): other.logprob for other in token.top})
            made["text_offset"].append(self._offset)
            self._offset += len(text)
        return made


class CompletionWriter(ChunkWriter):
    """Chunks. `prompts`: the texts of the prompts."""

    def __init__(self, choices: Choices, body: CompletionBody, model: str, prompts: Sequence[str]) -> None:
        self._choices = choices
        options = body.stream_options
        self._usage = options is not None and options.include_usage
        self._always = options is not None and options.continuous_usage_stats
        head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": model}
        self._head = f"data: {dump(head)[:-1]}, "
        self._texts = [_Text(choice, body, prompts[choice.prompt]) for choice in choices.all]

    def begin(self) -> bytes:
        return b""

    def piece(self, piece: Piece) -> bytes:
        text, logprobs = self._texts[piece.choice.index].add(piece)
        if not text and not logprobs and not piece.last:
            return b""
        choice = piece.choice
        end = f'"{choice.finish}", "stop_reason": {dump(choice.stop_reason)}' if piece.last else "null"
        written = f'"index": {choice.index}, "text": {quoted(text)}, "logprobs": {dump(logprobs)}, "finish_reason": {end}'
        usage = f', "usage": {dump(self._choices.usage.openai())}' if self._always else ', "usage": null' if self._usage else ""
        return f'{self._head}"choices": [{{{written}}}]{usage}}}\n\n'.encode()


def whole_completion(choices: Choices, pieces: list[Piece], body: CompletionBody, model: str, prompts: Sequence[str]) -> dict[str, Any]:
    texts = [_Text(choice, body, prompts[choice.prompt]) for choice in choices.all]
    made: list[dict[str, Any]] = [
        {"index": choice.index, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None} for choice in choices.all
    ]
    for piece in pieces:
        text, logprobs = texts[piece.choice.index].add(piece)
        one = made[piece.choice.index]
        one["text"] += text
        if logprobs:
            one["logprobs"] = {name: (one["logprobs"] or {}).get(name, []) + values for name, values in logprobs.items()}
        if piece.last:
            one |= {"finish_reason": piece.choice.finish, "stop_reason": piece.choice.stop_reason}
    head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": model}
    return {**head, "choices": made, "usage": choices.usage.openai()}
