"""``GET /v1/models``: the pipelines, and the embedder."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from telerag_cli.server.responses import Model, ModelList
from telerag_cli.server.service import Service, no_model


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["Models"])
    created = int(service.started_at)

    def describe(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "telerag"}

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
