"""The page at ``/``, and the description of the API at ``/docs``: fixed files from packages, and no address outside."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

from fastapi import APIRouter, Request, Response

from telerag_cli.server.errors import NOT_FOUND, ApiError

HTML, CSS, JS, ICON = "text/html", "text/css", "text/javascript", "image/svg+xml"
OWN = {
    "page.css": CSS,
    "icon.svg": ICON,
    **{
        f"{stem}.js": JS
        for stem in (
            "answer",
            "api",
            "compare",
            "conversation",
            "docs",
            "dom",
            "format",
            "main",
            "passage",
            "settings",
            "state",
            "store",
            "theme",
            "timeline",
        )
    },
}
"""What ``/page/`` serves of our own, and its media types."""
SWAGGER = {"swagger-ui.css": CSS, "swagger-ui-bundle.js": JS}
"""What it serves of Swagger UI, which the package ``fastapi-offline`` carries."""

STRICT = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Policy of the page: its own files, its own server, and nothing written into it."""
DOCS = STRICT.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
"""Swagger UI writes styles into the page."""


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
        """The file, or that the client's copy is still right. Kept copies are asked about each time, as a page is of one version."""
        headers = {"etag": self.tag, "cache-control": "no-cache", "content-security-policy": self.policy}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if known & {self.tag, "*"}:
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers=headers, media_type=self.media_type)


def router() -> APIRouter:
    """Routes ``/``, ``/page/{name}`` and ``/docs``, none of them in the description of the API."""
    routes = APIRouter(include_in_schema=False)
    page = _asset("index.html", HTML)
    docs = _asset("docs.html", HTML, policy=DOCS)
    assets = {name: _asset(name, media_type) for name, media_type in OWN.items()}
    assets |= {
        name: _asset(name, media_type, package="fastapi_offline", folder="static")
        for name, media_type in SWAGGER.items()
    }

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


def _asset(
    name: str, media_type: str, *, policy: str = STRICT, package: str = __package__, folder: str = "page"
) -> Asset:
    return Asset(resources.files(package).joinpath(folder, name).read_bytes(), media_type, policy)
