"""Answers of /v1/chat/completions: chunks and whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_export.runtimes.server.answer_choices import Choice, Choices, Piece
from qwen_export.runtimes.server.chunk_writer import ChunkWriter
from qwen_export.runtimes.server.server_settings import ServerSettings
from qwen_export.runtimes.server.wire_json import dump, new_id, quoted, shown
from qwen_export.runtimes.structured.answer_events import Candidate, TokenLogprob
from qwen_export.runtimes.text.reasoning import Content, Reasoning
from qwen_export.runtimes.text.tool_calls import CallArguments, CallStarted


class ChatWriter(ChunkWriter):
    """Chunks. `usage`: a last chunk with the tokens of all choices; `always`: each chunk has them."""

    def __init__(self, choices: Choices, model: str, settings: ServerSettings, *, usage: bool, always: bool) -> None:
        self._choices, self._usage, self._always = choices, usage, always
        self._fields = settings.reasoning_fields
        head = {"id": new_id("chatcmpl-"), "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
        self._head = f"data: {dump({**head, 'system_fingerprint': None})[:-1]}, "
        self._begin = [f'{self._head}"choices": [{{"index": {choice.index}, "delta": {{' for choice in choices.all]
        self._common = "" if not usage or always else ', "usage": null'

    def begin(self) -> bytes:
        role = '"role": "assistant", "content": ""'
        return "".join([self._chunk(choice, role) for choice in self._choices.all]).encode()

    def piece(self, piece: Piece) -> bytes:
        choice = piece.choice
        chunks: list[str] = []
        tokens: Sequence[TokenLogprob] = piece.tokens
        for event in piece.events:
            match event:
                case Content(text):
                    delta = f'"content": {quoted(text)}'
                case Reasoning(text):
                    quote = quoted(text)
                    delta = ", ".join([f'"{name}": {quote}' for name in self._fields])
                case CallStarted(index, id, name):
                    call = f'"id": "{id}", "type": "function", "function": {{"name": {quoted(name)}, "arguments": ""}}'
                    delta = f'"tool_calls": [{{"index": {index}, {call}}}]'
                case CallArguments(index, text):
                    delta = f'"tool_calls": [{{"index": {index}, "function": {{"arguments": {quoted(text)}}}}}]'
                case _:
                    continue
            if isinstance(event, Reasoning):
                chunks.append(self._chunk(choice, delta))
            else:
                chunks.append(self._chunk(choice, delta, tokens))
                tokens = ()
        if tokens:
            chunks.append(self._chunk(choice, '"content": ""', tokens))
        if piece.last:
            chunks.append(self._chunk(choice, "", finish=choice))
        return "".join(chunks).encode()

    def _chunk(self, choice: Choice, delta: str, tokens: Sequence[TokenLogprob] = (), finish: Choice | None = None) -> str:
        logprobs = dump(logprobs_of(tokens)) if tokens else "null"
        reason = f'"{finish.finish}", "stop_reason": {dump(finish.stop_reason)}' if finish else "null"
        usage = f', "usage": {dump(self._choices.usage.openai())}' if self._always else self._common
        return f'{self._begin[choice.index]}{delta}}}, "logprobs": {logprobs}, "finish_reason": {reason}}}]{usage}}}\n\n'


@dataclass
class Collected:
    """All that came of one choice."""

    choice: Choice
    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.tokens += piece.tokens
        for event in piece.events:
            match event:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case CallStarted(_, id, name):
                    self.calls.append({"id": id, "name": name, "arguments": ""})
                case CallArguments(index, text):
                    self.calls[index]["arguments"] += text


def collect(choices: Choices, pieces: list[Piece]) -> list[Collected]:
    """Pieces by their choices."""
    made = [Collected(choice) for choice in choices.all]
    for piece in pieces:
        made[piece.choice.index].add(piece)
    return made


def whole_chat(choices: Choices, pieces: list[Piece], model: str, settings: ServerSettings) -> dict[str, Any]:
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
        "choices": [_choice(made, settings) for made in collect(choices, pieces)],
        "usage": choices.usage.openai(),
    }


def _choice(made: Collected, settings: ServerSettings) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": made.content or (None if made.calls else ""), "refusal": None}
    if made.reasoning:
        message |= dict.fromkeys(settings.reasoning_fields, made.reasoning)
    if made.calls:
        message["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in made.calls
        ]
    return {
        "index": made.choice.index,
        "message": message,
        "logprobs": logprobs_of(made.tokens) if made.choice.has_logprobs else None,
        "finish_reason": made.choice.finish,
        "stop_reason": made.choice.stop_reason,
    }


def logprobs_of(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [{**_candidate(token), "top_logprobs": [_candidate(other) for other in token.top]} for token in tokens],
        "refusal": None,
    }


def _candidate(token: Candidate) -> dict[str, Any]:
    return {"token": shown(token.text), "logprob": token.logprob, "bytes": list(token.text)}
