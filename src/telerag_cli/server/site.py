"""The page at ``/``, and the description of the API at ``/docs``: fixed files from packages, nothing from outside."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources

from fastapi import APIRouter, Request, Response

from telerag_cli.server.errors import NOT_FOUND, ApiError

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
SWAGGER = ("swagger-ui.css", "swagger-ui-bundle.js")
"""What ``/page/`` serves of Swagger UI, which the package ``fastapi-offline`` carries."""

STRICT = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the page: its own files, its own server, and nothing written into it."""
WITH_STYLES = STRICT.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
"""Policy of ``/docs``: Swagger UI writes styles into the page."""


@dataclass(frozen=True)
class Asset:
    """A file as it is sent."""

    body: bytes
    media_type: str
    policy: str = STRICT

    @cached_property
    def tag(self) -> str:
        """Its ETag: the same for the same bytes, whatever process serves them."""
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'

    def response(self, request: Request) -> Response:
        """Return the file, or that the client's copy is current; it asks each time, as a page is of one version."""
        headers = {"etag": self.tag, "cache-control": "no-cache", "content-security-policy": self.policy}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if known & {self.tag, "*"}:
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers=headers, media_type=self.media_type)


def router() -> APIRouter:
    """Return the routes ``/``, ``/page/{name}`` and ``/docs``, none of them in the description of the API."""
    routes = APIRouter(include_in_schema=False)
    own = resources.files(__package__) / "page"
    swagger = resources.files("fastapi_offline") / "static"
    files = [*own.iterdir(), *(swagger / name for name in SWAGGER)]
    assets = {
        file.name: Asset(file.read_bytes(), media_type)
        for file in files
        if (media_type := MEDIA_TYPES.get(f".{file.name.rpartition('.')[2]}"))
    }
    page = assets.pop("index.html")
    docs = replace(assets.pop("docs.html"), policy=WITH_STYLES)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def show_page(request: Request) -> Response:
        return page.response(request)

    @routes.api_route("/docs", methods=["GET", "HEAD"])
    async def show_docs(request: Request) -> Response:
        return docs.response(request)

    @routes.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def show_asset(name: str, request: Request) -> Response:
        if name not in assets:
            raise ApiError(404, "The page has no such file.", NOT_FOUND)
        return assets[name].response(request)

    return routes
