"""What is around the answers: models, tokens, health, figures."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from qwen_export.runtimes.server.ask import Ask
from qwen_export.runtimes.server.chat_request import SWITCHES, with_content
from qwen_export.runtimes.server.request_body import Body, read_body
from qwen_export.runtimes.server.service import Service
from qwen_export.runtimes.server.serving_metrics import CONTENT_TYPE
from qwen_export.runtimes.server.wire_errors import HttpError
from qwen_export.version import __version__


class TokenizeBody(Body):
    model: str = ""
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_special_tokens: bool = True
    return_token_strs: bool = True


class DetokenizeBody(Body):
    model: str = ""
    tokens: list[int]


def model_routes(service: Service) -> APIRouter:
    router = APIRouter()
    settings = service.settings

    def card(name: str) -> dict[str, Any]:
        made = {"id": name, "object": "model", "created": service.created, "owned_by": "qwen-export", "root": service.names[0]}
        capabilities = {"vision": service.model.manifest.vision is not None}
        return {**made, "parent": None, "max_model_len": service.engine.longest, "capabilities": capabilities}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        service.check_open()
        return {"object": "list", "data": [card(name) for name in service.names]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_open()
        return card(service.served_name(name))

    @router.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await read_body(request, TokenizeBody, settings)
        service.served_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise HttpError("one of prompt and messages is needed", code="invalid_value", field="prompt", fix="Give one of them.")
        if body.messages is None:
            ask = Ask(prompts=[body.prompt or ""])
        else:
            variables = dict(body.chat_template_kwargs)
            switches = {name: variables.pop(name, None) for name in SWITCHES}
            ask = Ask([with_content(one) for one in body.messages], tools=body.tools or None, template=switches, variables=variables)
        ids = await service.prompt_ids(ask)
        made: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.longest, "tokens": ids}
        if body.return_token_strs:
            made["token_strs"] = [service.model.tokenizer.decode([i]) for i in ids]
        return made

    @router.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, str]:
        body = await read_body(request, DetokenizeBody, settings)
        service.served_name(body.model)
        tokenizer = service.model.tokenizer
        return {"prompt": tokenizer.decode(tokenizer.checked_ids(body.tokens))}

    @router.get("/health")
    async def health() -> Response:
        trouble = service.trouble
        return Response(trouble, status_code=503, media_type="text/plain") if trouble else Response(status_code=200)

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return router
