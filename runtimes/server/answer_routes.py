"""The four protocols: each reads its body, asks the engine, and writes the same stream of events in its own form."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from qwen_export.runtimes.server.answer_choices import Choices
from qwen_export.runtimes.server.answer_response import EventStream, WholeAnswer
from qwen_export.runtimes.server.chat_answer import ChatWriter, whole_chat
from qwen_export.runtimes.server.chat_request import ChatBody, chat_ask
from qwen_export.runtimes.server.completion_answer import CompletionWriter, whole_completion
from qwen_export.runtimes.server.completion_request import CompletionBody, completion_ask
from qwen_export.runtimes.server.messages_answer import MessagesWriter, whole_message
from qwen_export.runtimes.server.messages_request import CountBody, MessagesBody, messages_ask, thinks
from qwen_export.runtimes.server.request_body import AnswerBody, read_body
from qwen_export.runtimes.server.responses_answer import ResponsesWriter, whole_response
from qwen_export.runtimes.server.responses_request import ResponsesBody, responses_ask
from qwen_export.runtimes.server.service import Service
from qwen_export.runtimes.server.wire_errors import HttpError

Asked = TypeVar("Asked", bound=AnswerBody)


def answer_routes(service: Service) -> APIRouter:
    router = APIRouter()
    settings = service.settings

    async def begun(request: Request, kind: type[Asked]) -> tuple[Asked, str]:
        """The request, and the name of the model that it will be answered under."""
        service.check_open()
        body = await read_body(request, kind, settings)
        return body, service.served_name(body.model)

    def answered(choices: Choices, writer: Any, render: Any, stream: bool) -> Response:
        done = partial(service.finished, choices)
        if stream:
            return EventStream(choices, writer(), settings, done)
        return WholeAnswer(choices, render, settings, done)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body, model = await begun(request, ChatBody)
        choices = await service.submit(chat_ask(body))
        options = body.stream_options
        usage, always = (options.include_usage, options.continuous_usage_stats) if options else (False, False)
        writer = partial(ChatWriter, choices, model, settings, usage=usage, always=always)
        return answered(choices, writer, lambda pieces: whole_chat(choices, pieces, model, settings), body.stream)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body, model = await begun(request, CompletionBody)
        ask = completion_ask(body)
        decode = service.model.tokenizer.decode
        choices = await service.submit(ask)
        texts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in ask.prompts]
        writer = partial(CompletionWriter, choices, body, model, texts)
        return answered(choices, writer, lambda pieces: whole_completion(choices, pieces, body, model, texts), body.stream)

    @router.post("/v1/responses")
    async def responses(request: Request) -> Response:
        body, model = await begun(request, ResponsesBody)
        choices = await service.submit(responses_ask(body))
        writer = partial(ResponsesWriter, choices, body, model)
        return answered(choices, writer, lambda pieces: whole_response(choices, pieces, body, model), body.stream)

    @router.get("/v1/responses/{name}")
    async def stored_response(name: str) -> Response:
        raise HttpError("responses are not stored here", status=404, code="not_found", fix="Keep what the request returned.")

    @router.post("/v1/messages")
    async def messages(request: Request) -> Response:
        body, model = await begun(request, MessagesBody)
        choices = await service.submit(messages_ask(body))
        thinking = thinks(body)
        writer = partial(MessagesWriter, choices, model, thinking=thinking)
        return answered(choices, writer, lambda pieces: whole_message(choices, pieces, model, thinking=thinking), body.stream)

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> dict[str, int]:
        body = await read_body(request, CountBody, settings)
        service.served_name(body.model)
        return {"input_tokens": len(await service.prompt_ids(messages_ask(body)))}

    return router
