"""The application: all routes over one service, and their errors in OpenAI's form."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from telerag_cli.errors import TeleragError
from telerag_cli.server import answers, embeddings, site, vector_stores
from telerag_cli.server.access_log import CLIENT_CLOSED
from telerag_cli.server.errors import INVALID, NOT_FOUND, ApiError, as_api_error
from telerag_cli.server.replies import note
from telerag_cli.server.responses import ErrorBody, Model, ModelList
from telerag_cli.server.service import Service, Status, no_model
from telerag_cli.server.streams import ClientGoneError
from telerag_cli.server.validation import invalid_request

MAX_SEGMENTS = 10
"""Of a path that is looked at for what was meant."""
DESCRIPTION = (
    "Retrieval-augmented generation with lookahead, by OpenAI's protocol. Each pipeline is a model; the one vector "
    "store is the index. Answers carry the passages they rest on, and what each stage took, in the field `telerag`."
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
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": words} for status, words in REASONS.items()
}


def make_app(service: Service) -> FastAPI:
    """Return the application; what every request passes before it is in `middleware`."""
    app = _App(
        title="telerag",
        version=service.version,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        responses=ERRORS,
        exception_handlers=_HANDLERS,
    )
    for make in (answers.router, embeddings.router, _models, vector_stores.router, _monitoring):
        routes = make(service)
        app.include_router(routes)
        app.paths += [route.path_regex for route in routes.routes if isinstance(route, APIRoute)]
    app.include_router(site.router())
    return app


class _App(FastAPI):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.paths: list[re.Pattern[str]] = []
        """Of the routes of the API."""

    def meant(self, path: str) -> str | None:
        """Return what of the API a wrong path ends with: ``/v1/models`` for ``/models`` and ``/v1/v1/models``."""
        parts = path.split("/")[1:MAX_SEGMENTS]
        candidates = ["/v1/" + "/".join(parts[start:]) for start in range(len(parts))]
        return next((each for each in candidates if any(known.match(each) for known in self.paths)), None)

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document without FastAPI's own errors for malformed requests: here their status is 400."""
        made = super().openapi()
        for operations in made["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        return made


def _models(service: Service) -> APIRouter:
    """Return the routes for the pipelines and the embedder."""
    routes = APIRouter(tags=["Models"])

    def describe(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": int(service.started_at), "owned_by": "telerag"}

    @routes.get("/v1/models", response_model=ModelList)
    async def list_models() -> dict[str, Any]:
        """List the names that requests may give as their model."""
        return {"object": "list", "data": [describe(name) for name in service.models]}

    @routes.get("/v1/models/{model}", response_model=Model)
    async def retrieve_model(model: str) -> dict[str, Any]:
        """Describe one of them."""
        if model not in service.models:
            raise no_model(model)
        return describe(model)

    return routes


def _monitoring(service: Service) -> APIRouter:
    """Return the routes for monitoring."""
    routes = APIRouter(tags=["Server"])

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process is there."""
        return {"status": "ok"}

    @routes.head("/ready", include_in_schema=False)
    @routes.get("/ready")
    async def ready() -> JSONResponse:
        """Say whether questions are answered: model and index are loaded and warm."""
        status = service.status
        return JSONResponse({"status": status.value}, 200 if status is Status.READY else 503)

    @routes.head("/metrics", include_in_schema=False)
    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the metrics for Prometheus."""
        data, media_type = service.metrics.exposition()
        return Response(data, headers={"content-type": media_type})

    @routes.get("/telerag/state")
    async def state() -> dict[str, Any]:
        """Return what the server is doing, for the page."""
        return service.state()

    return routes


async def _refused(request: Request, error: Exception) -> Response:
    answer = as_api_error(error, request.state.request_id)
    if answer.status >= 500 and isinstance(error, TeleragError):
        note(request, outcome="failed", error=str(error))
    return answer.response()


async def _invalid_request(_request: Request, error: RequestValidationError) -> Response:
    return invalid_request(error).response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Answer after an error of the framework itself."""
    path = request.url.path[:80]
    words = {404: f"There is nothing at {request.method} {path}.", 405: f"{request.method} is not allowed at {path}."}
    message = words.get(error.status_code, str(error.detail))
    if error.status_code == 404 and (meant := request.app.meant(path)):
        message += f" It is at {meant}: the base URL of clients ends with /v1, once."
    kind = NOT_FOUND if error.status_code == 404 else INVALID
    return ApiError(error.status_code, message, kind, headers=error.headers or {}).response()


async def _client_gone(_request: Request, _error: ClientGoneError) -> Response:
    return Response(status_code=CLIENT_CLOSED)


_HANDLERS: dict[int | type[Exception], Any] = {
    **dict.fromkeys((Exception, ApiError, TeleragError), _refused),
    RequestValidationError: _invalid_request,
    HTTPException: _http_error,
    ClientGoneError: _client_gone,
}
