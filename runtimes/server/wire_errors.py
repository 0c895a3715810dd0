"""Errors as the protocols write them.

OpenAI's routes: {"error": {"message", "type", "param", "code"}}; /v1/messages: {"type": "error", "error": {"type", "message"}}. Clients
repeat a request after 408, 409, 429 and 500 or more, unless `x-should-retry` is false.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import traceback
from collections.abc import Mapping
from typing import Any

from qwen_export.errors import ContextOverflow, OverloadedError, ParameterError, QwenExportError, TemplateError

_log = logging.getLogger("qwen_export.server")

# Parameters of the Python API whose field in a request has another name.
_FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "template_kwargs": "chat_template_kwargs",
    "form": "response_format",
    "answer": "response_format",
    "include_stop": "include_stop_str_in_output",
    "max_waiting": "max_queue",
}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_RETRY_AFTER_S = 5
"""When a server that starts or stops may be tried again."""


class HttpError(QwenExportError):
    """A request that ends with this status. `field`: the field of the request at fault; `code`: a word for programs."""

    def __init__(
        self,
        what: str,
        *,
        status: int = 400,
        code: str | None = None,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
        got: object = "",
        expected: object = "",
        fix: str = "",
    ) -> None:
        self.status, self.code, self.field, self.headers = status, code, field, dict(headers or {})
        super().__init__(what, got=got, expected=expected, fix=fix)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An error in the form of no protocol."""

    status: int
    message: str
    code: str | None = None
    field: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def openai(self) -> dict[str, Any]:
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def refusal_of(error: BaseException, retry_after: int = 1) -> Refusal:
    """The error as a client sees it. `retry_after`: seconds after which a request that found the queue full may come again. What is no
    error of ours is logged, and its text is not shown."""
    if isinstance(error, HttpError):
        return Refusal(error.status, error.text(wire_name), error.code, error.field, error.headers)
    if isinstance(error, ContextOverflow):
        return Refusal(400, error.text(wire_name), "context_length_exceeded", "messages")
    if isinstance(error, OverloadedError):
        return Refusal(429, error.text(wire_name), "queue_full", None, {"Retry-After": str(retry_after)})
    if isinstance(error, ParameterError):
        return Refusal(400, error.text(wire_name), "invalid_value", wire_name(error.parameter))
    if isinstance(error, TemplateError):
        return Refusal(400, error.text(wire_name), "template_error", "messages")
    _log.error("a request failed:\n%s", "".join(traceback.format_exception(error)).rstrip())
    message = error.text(wire_name) if isinstance(error, QwenExportError) else "the server failed to answer."
    return Refusal(500, message, "internal_error", None, {"x-should-retry": "false"})


def stopping() -> HttpError:
    return HttpError(
        "the server is stopping",
        status=503,
        code="stopping",
        headers={"Retry-After": str(_RETRY_AFTER_S)},
        fix="Send the request again later.",
    )


def starting() -> HttpError:
    return HttpError(
        "the model is being loaded",
        status=503,
        code="starting",
        headers={"Retry-After": str(_RETRY_AFTER_S)},
        fix="Send the request again later.",
    )


def wire_name(parameter: str) -> str:
    """The field of a request for a parameter of the Python API."""
    return _FIELDS.get(parameter, parameter)


def is_anthropic(path: str) -> bool:
    """Whether errors at an address have Anthropic's form."""
    return "/v1/messages" in path


def error_body(refusal: Refusal, path: str) -> bytes:
    body = refusal.anthropic() if is_anthropic(path) else refusal.openai()
    return json.dumps(body, ensure_ascii=False).encode()
