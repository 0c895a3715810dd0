"""Bodies of requests: limited in size and time, JSON, and checked against a pydantic model."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect

from qwen_export.runtimes.server.server_settings import ServerSettings
from qwen_export.runtimes.server.wire_errors import HttpError

_SHOWN = 200
"""Characters of a wrong value that an error repeats."""


class Body(BaseModel):
    """Unknown fields are ignored: every client sends some. null is the default of a field."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class AnswerBody(Body):
    """What is asked of a model, by its name; "" for the one that is served."""

    model: str = ""


BodyKind = TypeVar("BodyKind", bound=Body)


async def read_body(request: Request, kind: type[BodyKind], settings: ServerSettings) -> BodyKind:
    """The body of a request. Raises HttpError 400, 408, 413 and 415."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise HttpError("the body is compressed", status=415, got=encoding, fix="Send the body as it is.")
    return parse_body(await _read(request, settings), kind)


async def _read(request: Request, settings: ServerSettings) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > settings.max_body:
        raise _too_large(length, settings)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > settings.max_body:
                    raise _too_large(size, settings)
                parts.append(part)
    except TimeoutError as error:
        raise HttpError(
            "the body did not arrive in time",
            status=408,
            got=f"{size} bytes in {settings.body_timeout_s:g} s",
            headers={"Connection": "close"},
            fix="Send the request again.",
        ) from error
    except ClientDisconnect as error:
        raise HttpError("the client has left", status=499, fix="Send the request again.") from error
    return b"".join(parts)


def _too_large(size: object, settings: ServerSettings) -> HttpError:
    return HttpError(
        "the body is too large",
        status=413,
        code="request_too_large",
        got=f"{size} bytes",
        expected=f"at most {settings.max_body}",
        headers={"Connection": "close"},
        fix="Shorten the request.",
    )


def parse_body(data: bytes, kind: type[BodyKind]) -> BodyKind:
    """JSON text as a body. The order of keys in objects stays: templates write tools as they are given."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HttpError("the body is not JSON", code="invalid_json", got=error, fix="Send one JSON object.") from error
    if not isinstance(fields, dict):
        raise HttpError("the body is not an object", code="invalid_json", got=type(fields).__name__, fix="Send one JSON object.")
    try:
        return kind.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise _wrong_field(error) from error


def _wrong_field(error: ValidationError) -> HttpError:
    first: Any = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier())
    if first["type"] == "missing":
        return HttpError(f"the field {name} is missing", code="missing_field", field=name, fix=f"Give {name}.")
    got = repr(first.get("input"))
    return HttpError(
        f"the field {name} cannot be read",
        code="invalid_value",
        field=name,
        got=got if len(got) <= _SHOWN else got[:_SHOWN] + "...",
        expected=first["msg"],
        fix="Correct the field.",
    )
