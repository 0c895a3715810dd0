"""The ASGI application, which any server of such can run: `qwen-export serve`, uvicorn, or Ray Serve around it.

service = Service(ServerSettings())
app = create_app(service)          # listens, and answers 503
service.start(model, Engine.of(model, slots=8))
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse

from qwen_export.errors import QwenExportError
from qwen_export.runtimes.server.access import Access
from qwen_export.runtimes.server.answer_routes import answer_routes
from qwen_export.runtimes.server.model_routes import model_routes
from qwen_export.runtimes.server.service import Service
from qwen_export.runtimes.server.wire_errors import HttpError, error_body
from qwen_export.version import __version__

PAGE = Path(__file__).parent / "page"
# The page loads and reaches nothing but this server.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(service: Service) -> FastAPI:
    settings = service.settings
    # The documentation pages of FastAPI load their scripts from another host.
    app = FastAPI(title="qwen-export", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(answer_routes(service))
    app.include_router(model_routes(service))

    async def refuse(request: Request, error: Exception) -> Response:
        refusal = service.refusal(_known(error))
        return Response(error_body(refusal, request.url.path), refusal.status, refusal.headers, "application/json")

    for kind in (QwenExportError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_middleware(Access, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"], max_age=600
        )
    if settings.page and PAGE.is_dir():
        _add_page(app)
    return app


def _known(error: Exception) -> Exception:
    """Errors of the libraries in our form."""
    if isinstance(error, HTTPException):
        return HttpError(
            "there is no such address" if error.status_code == 404 else str(error.detail).lower().rstrip("."),
            status=error.status_code,
            code="not_found" if error.status_code == 404 else None,
            headers=dict(error.headers or {}),
            fix="See /openapi.json for addresses and methods.",
        )
    if isinstance(error, RequestValidationError):
        return HttpError("the request cannot be read", code="invalid_value", got=str(error.errors())[:200], fix="Correct the request.")
    return error


def _add_page(app: FastAPI) -> None:
    """The files of the page, each at an address of its own: a mount at / would answer for addresses that do not exist."""
    for path in sorted(PAGE.iterdir()):
        for address in ("/", f"/{path.name}") if path.name == "index.html" else (f"/{path.name}",):
            app.add_api_route(address, _sender(path), methods=["GET", "HEAD"], include_in_schema=False)


def _sender(path: Path) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return FileResponse(path, headers=_PAGE_HEADERS)

    return send
