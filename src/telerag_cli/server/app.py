"""The application: all routes over one service, and their errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from telerag_cli.errors import TeleragError
from telerag_cli.server import chat, completions, embeddings, models, site, vector_stores
from telerag_cli.server.access_log import CLIENT_CLOSED
from telerag_cli.server.errors import INVALID, NOT_FOUND, ApiError, told
from telerag_cli.server.gates import unhandled
from telerag_cli.server.protocol import ErrorBody, invalid
from telerag_cli.server.replies import Documented, note
from telerag_cli.server.service import Service, Status
from telerag_cli.server.streams import ClientGoneError

DESCRIPTION = (
    "Retrieval-augmented generation with lookahead, by OpenAI's protocol. Each pipeline is a model; the one vector store is the "
    "index. Answers carry the passages they rest on, and what each stage took, in the field `telerag`."
)
REASONS = {
    400: "What is asked for cannot be done.",
    401: "The API key is missing or wrong.",
    404: "There is no such thing.",
    408: "The request's body took too long to come.",
    413: "The request is too large.",
    421: "The server does not answer to this host name.",
    500: "The server failed.",
    503: "The queue is full, or the server is loading or stopping; `Retry-After` says when to try again.",
    504: "The answer took too long.",
}
ERRORS: Documented = {status: {"model": ErrorBody, "description": words} for status, words in REASONS.items()}


def make_app(service: Service) -> FastAPI:
    """The application. What every request passes before it is in `gates`."""
    app = FastAPI(
        title="telerag",
        version=service.version,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        responses=ERRORS,
    )
    for part in (chat, completions, embeddings, models, vector_stores):
        app.include_router(part.router(service))
    app.include_router(_watching(service))
    app.include_router(site.router())
    app.openapi_schema = _described(app)
    app.add_exception_handler(Exception, unhandled)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the status and the form of errors that FastAPI has for requests that are wrong: here it is 400."""
    made = app.openapi()
    for operations in made["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        made["components"]["schemas"].pop(name, None)
    return made


def _watching(service: Service) -> APIRouter:
    """Routes for those who look after the server."""
    routes = APIRouter(tags=["Server"])

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process is there."""
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> JSONResponse:
        """Whether questions are answered: model and index are loaded and warm."""
        status = service.status
        return JSONResponse({"status": status.value}, 200 if status is Status.READY else 503)

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        data, media_type = service.metrics.exposition()
        return Response(data, headers={"content-type": media_type})

    @routes.get("/telerag/state")
    async def state() -> dict[str, Any]:
        """What the server is doing, for the page."""
        return service.state()

    return routes


async def _api_error(_request: Request, error: ApiError) -> Response:
    return error.response()


async def _telerag_error(request: Request, error: TeleragError) -> Response:
    answer = told(error, request.state.request_id)
    if answer.status >= 500:
        note(request, outcome="failed", error=str(error))
    return answer.response()


async def _invalid(_request: Request, error: RequestValidationError) -> Response:
    return invalid(error).response()


async def _http(request: Request, error: HTTPException) -> Response:
    """Errors of the framework itself."""
    words = {
        404: f"There is nothing at {request.method} {request.url.path[:80]}.",
        405: f"{request.method} is not allowed at {request.url.path[:80]}.",
    }
    kind = NOT_FOUND if error.status_code == 404 else INVALID
    return ApiError(
        error.status_code, words.get(error.status_code, str(error.detail)), kind, headers=error.headers
    ).response()


async def _gone(_request: Request, _error: ClientGoneError) -> Response:
    return Response(status_code=CLIENT_CLOSED)


_HANDLERS: dict[type[Exception], Any] = {
    ApiError: _api_error,
    TeleragError: _telerag_error,
    RequestValidationError: _invalid,
    HTTPException: _http,
    ClientGoneError: _gone,
}
