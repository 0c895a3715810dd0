"""Answers of /v1/messages: named events with one block at a time, and whole."""

from __future__ import annotations

import json
from typing import Any

from qwen_export.runtimes.server.answer_choices import Choice, Choices, Piece
from qwen_export.runtimes.server.chat_answer import collect
from qwen_export.runtimes.server.wire_errors import Refusal
from qwen_export.runtimes.server.wire_json import dump, new_id, quoted
from qwen_export.runtimes.text.reasoning import Content, Reasoning
from qwen_export.runtimes.text.tool_calls import CallArguments, CallEnded, CallStarted

_SIGNATURE = "none"
"""Clients send it back with the thinking; there is nothing to prove."""


class MessagesWriter:
    """`thinking`: whether reasoning is shown."""

    def __init__(self, choices: Choices, model: str, *, thinking: bool) -> None:
        self._choices, self._model, self._thinking = choices, model, thinking
        self._block, self._open = -1, ""

    def begin(self) -> bytes:
        prompt = sum(len(choice.prepared.request.ids) for choice in self._choices.all)
        usage = {"input_tokens": prompt, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 0}
        message: dict[str, Any] = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": self._model, "content": []}
        message |= {"stop_reason": None, "stop_sequence": None, "usage": usage}
        return (_event("message_start", f'"message": {dump(message)}') + _event("ping", "")).encode()

    def piece(self, piece: Piece) -> bytes:
        made: list[str] = []
        for event in piece.events:
            match event:
                case Reasoning(text):
                    if self._thinking:
                        made += [
                            self._opened("thinking", '"thinking": "", "signature": ""'),
                            self._delta("thinking_delta", "thinking", text),
                        ]
                case Content(text):
                    made += [self._opened("text", '"text": ""'), self._delta("text_delta", "text", text)]
                case CallStarted(_, id, name):
                    made.append(self._opened("tool_use", f'"id": "{call_id(id)}", "name": {quoted(name)}, "input": {{}}', again=True))
                case CallArguments(_, text):
                    made.append(self._delta("input_json_delta", "partial_json", text))
                case CallEnded():
                    made.append(self._closed())
        return "".join(made).encode()

    def _opened(self, kind: str, fields: str, again: bool = False) -> str:
        """The end of another block and the beginning of one of this kind, where it is not open."""
        if kind == self._open and not again:
            return ""
        closed = self._closed()
        self._block += 1
        self._open = kind
        block = f'"index": {self._block}, "content_block": {{"type": "{kind}", {fields}}}'
        return closed + _event("content_block_start", block)

    def _delta(self, kind: str, field: str, text: str) -> str:
        return _event("content_block_delta", f'"index": {self._block}, "delta": {{"type": "{kind}", "{field}": {quoted(text)}}}')

    def _closed(self) -> str:
        if not self._open:
            return ""
        signed = self._delta("signature_delta", "signature", _SIGNATURE) if self._open == "thinking" else ""
        self._open = ""
        return signed + _event("content_block_stop", f'"index": {self._block}')

    def end(self) -> bytes:
        choice = self._choices.all[0]
        delta = f'"delta": {dump(_stop(choice))}, "usage": {dump(_usage(self._choices))}'
        empty = self._opened("text", '"text": ""') if self._block < 0 else ""
        return (empty + self._closed() + _event("message_delta", delta) + _event("message_stop", "")).encode()

    def error(self, refusal: Refusal) -> bytes:
        return f"event: error\ndata: {dump(refusal.anthropic())}\n\n".encode()


def call_id(id: str) -> str:
    """The id of a call as this protocol writes it."""
    return "toolu_" + id.removeprefix("call_")


def _event(kind: str, fields: str) -> str:
    return f'event: {kind}\ndata: {{"type": "{kind}"{", " + fields if fields else ""}}}\n\n'


def whole_message(choices: Choices, pieces: list[Piece], model: str, *, thinking: bool) -> dict[str, Any]:
    [made] = collect(choices, pieces)
    blocks: list[dict[str, Any]] = []
    if made.reasoning and thinking:
        blocks.append({"type": "thinking", "thinking": made.reasoning, "signature": _SIGNATURE})
    if made.content or not made.calls:
        blocks.append({"type": "text", "text": made.content})
    blocks += [
        {"type": "tool_use", "id": call_id(call["id"]), "name": call["name"], "input": _input(call["arguments"])} for call in made.calls
    ]
    head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}
    return {**head, "content": blocks, **_stop(made.choice), "usage": _usage(choices)}


def _input(arguments: str) -> Any:
    """Arguments as an object: empty where the answer was cut off inside them, as stop_reason tells."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def _stop(choice: Choice) -> dict[str, Any]:
    if choice.finish == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if choice.finish == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(choice.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(choices: Choices) -> dict[str, int]:
    """Here the tokens of the prompt are those that were not cached."""
    usage = choices.usage
    cached = usage.cached
    return {
        "input_tokens": usage.prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion,
    }
