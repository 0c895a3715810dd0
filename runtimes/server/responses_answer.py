"""Answers of /v1/responses: named, numbered events about the items of the output, and whole."""

from __future__ import annotations

import time
from typing import Any

from qwen_export.runtimes.server.answer_choices import Choices, Piece
from qwen_export.runtimes.server.responses_request import ResponsesBody, functions
from qwen_export.runtimes.server.wire_errors import Refusal
from qwen_export.runtimes.server.wire_json import dump, new_id, quoted
from qwen_export.runtimes.text.reasoning import Content, Reasoning
from qwen_export.runtimes.text.tool_calls import CallArguments, CallEnded, CallStarted

_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
"""The type of the one part of an item."""


class ResponsesWriter:
    """Keeps the output, which the last event has as a whole. One item is open at a time."""

    def __init__(self, choices: Choices, body: ResponsesBody, model: str) -> None:
        self._choices, self._body, self._model = choices, body, model
        self._namespaces = functions(body.tools)[1]
        self._id, self._created = new_id("resp_"), int(time.time())
        self._number = -1
        self._output: list[dict[str, Any]] = []
        self._item: dict[str, Any] | None = None
        self._text: list[str] = []

    def begin(self) -> bytes:
        response = f'"response": {dump(self._response("in_progress"))}'
        return (self._event("response.created", response) + self._event("response.in_progress", response)).encode()

    def piece(self, piece: Piece) -> bytes:
        made: list[str] = []
        for event in piece.events:
            match event:
                case Reasoning(text):
                    made += [self._opened("reasoning"), self._delta("response.reasoning_text.delta", text)]
                case Content(text):
                    made += [self._opened("message"), self._delta("response.output_text.delta", text)]
                case CallStarted(_, id, name):
                    made.append(self._closed() + self._call(id, name))
                case CallArguments(_, text):
                    self._text.append(text)
                    made.append(self._event("response.function_call_arguments.delta", f'{self._place()}, "delta": {quoted(text)}'))
                case CallEnded():
                    made.append(self._closed())
        return "".join(made).encode()

    def end(self) -> bytes:
        closed = self._opened("message") if not self._output and self._item is None else ""
        complete = self._choices.all[0].finish != "length"
        closed += self._closed("completed" if complete else "incomplete")
        kind = "response.completed" if complete else "response.incomplete"
        return (closed + self._event(kind, f'"response": {dump(self.whole())}')).encode()

    def error(self, refusal: Refusal) -> bytes:
        failed = self._response("failed") | {"error": {"code": refusal.code or "server_error", "message": refusal.message}}
        return self._event("response.failed", f'"response": {dump(failed)}').encode()

    def whole(self) -> dict[str, Any]:
        """The response behind its end."""
        complete = self._choices.all[0].finish != "length"
        made = self._response("completed" if complete else "incomplete")
        if not complete:
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        usage = self._choices.usage
        made["usage"] = {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.completion,
        }
        return made

    def _response(self, status: str) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": self._output,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _opened(self, kind: str) -> str:
        """The end of another item and the beginning of one of this kind, where it is not open."""
        if self._item is not None and self._item["type"] == kind:
            return ""
        closed = self._closed()
        if kind == "message":
            self._item = {"id": new_id("msg_"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        else:
            self._item = {"id": new_id("rs_"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
        added = self._event("response.output_item.added", f'"output_index": {len(self._output)}, "item": {dump(self._item)}')
        part = f'{self._place()}, "content_index": 0, "part": {dump(_part(kind, ""))}'
        return closed + added + self._event("response.content_part.added", part)

    def _call(self, id: str, name: str) -> str:
        self._item = {"id": new_id("fc_"), "type": "function_call", "status": "in_progress", "call_id": id, "name": name, "arguments": ""}
        if name in self._namespaces:
            self._item["namespace"] = self._namespaces[name]
        return self._event("response.output_item.added", f'"output_index": {len(self._output)}, "item": {dump(self._item)}')

    def _delta(self, kind: str, text: str) -> str:
        self._text.append(text)
        logprobs = ', "logprobs": []' if kind == "response.output_text.delta" else ""
        return self._event(kind, f'{self._place()}, "content_index": 0, "delta": {quoted(text)}{logprobs}')

    def _closed(self, status: str = "completed") -> str:
        item = self._item
        if item is None:
            return ""
        text, self._text = "".join(self._text), []
        item["status"] = status
        made = ""
        if item["type"] == "function_call":
            item["arguments"] = text
            name = quoted(item["name"])
            made += self._event("response.function_call_arguments.done", f'{self._place()}, "name": {name}, "arguments": {quoted(text)}')
        else:
            kind = "response.output_text.done" if item["type"] == "message" else "response.reasoning_text.done"
            logprobs = ', "logprobs": []' if item["type"] == "message" else ""
            part = _part(item["type"], text)
            item["content"] = [part]
            made += self._event(kind, f'{self._place()}, "content_index": 0, "text": {quoted(text)}{logprobs}')
            made += self._event("response.content_part.done", f'{self._place()}, "content_index": 0, "part": {dump(part)}')
        made += self._event("response.output_item.done", f'"output_index": {len(self._output)}, "item": {dump(item)}')
        self._output.append(item)
        self._item = None
        return made

    def _place(self) -> str:
        return f'"item_id": "{(self._item or {})["id"]}", "output_index": {len(self._output)}'

    def _event(self, kind: str, fields: str) -> str:
        self._number += 1
        return f'event: {kind}\ndata: {{"type": "{kind}", "sequence_number": {self._number}, {fields}}}\n\n'


def _part(kind: str, text: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": _PARTS[kind], "text": text}
    if kind == "message":
        part |= {"annotations": [], "logprobs": []}
    return part


def whole_response(choices: Choices, pieces: list[Piece], body: ResponsesBody, model: str) -> dict[str, Any]:
    """What the last event of a stream would have."""
    writer = ResponsesWriter(choices, body, model)
    for piece in pieces:
        writer.piece(piece)
    writer.end()
    return writer.whole()
