"""``POST /v1/embeddings``: vectors of texts, made as those of questions are."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from fastapi import APIRouter, Request, Response

from telerag_cli.server.errors import ApiError
from telerag_cli.server.replies import note
from telerag_cli.server.requests import EmbeddingRequest
from telerag_cli.server.responses import EmbeddingList
from telerag_cli.server.service import Service, no_model
from telerag_cli.server.streams import until_gone
from telerag_cli.server.validation import JsonRoute

if TYPE_CHECKING:
    from telerag_cli.embedding.encoder import Encoder  # imports the model library, which the engine has loaded

BATCH_SIZE = 32
BATCH_TOKENS = 1024
"""Texts embedded at once, and their tokens. Between two batches others have their turn, questions too, and a request
whose client is gone ends."""


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter(route_class=JsonRoute, tags=["Retrieval"])
    turns = asyncio.Lock()

    @routes.post("/v1/embeddings", response_model=EmbeddingList)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Embed texts as the index's questions are embedded; a text longer than the model sees is refused."""
        service.require_ready()
        _check_model(body, service)
        encoder = cast("Encoder", service.engine.embedder)
        note(request, model=body.model)
        data, tokens = await until_gone(request, service.within(_embedded(encoder, body, turns)))
        note(request, prompt_tokens=tokens, outcome="done")
        return Response(data, media_type="application/json")

    return routes


def _check_model(body: EmbeddingRequest, service: Service) -> None:
    if body.model != service.embedder_name:
        if body.model not in service.models:
            raise no_model(body.model)
        message = f"The model `{body.model}` answers and makes no embeddings; `{service.embedder_name}` makes them."
        raise ApiError(404, message, param="model", code="model_not_found")
    dimension = service.engine.retriever.index.manifest.dimension
    if body.dimensions not in (None, dimension):
        message = f"Invalid 'dimensions': it is {body.dimensions} and the model makes vectors of {dimension}."
        raise ApiError(400, message, param="dimensions", code="invalid_value")


async def _embedded(encoder: Encoder, body: EmbeddingRequest, turns: asyncio.Lock) -> tuple[str, int]:
    """Return the JSON, written batch by batch as a large one would hold up the event loop, and the texts' tokens."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    counts: list[int] = []
    for start in range(0, len(texts), BATCH_SIZE):
        async with turns:
            counts += await asyncio.to_thread(_count, encoder, body, texts[start : start + BATCH_SIZE], start)
    items = []
    for start, end in batches(counts):
        async with turns:
            items.append(await asyncio.to_thread(_encode, encoder, body, texts[start:end], start))
    rest = {"model": body.model, "usage": {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}}
    return f'{{"object":"list","data":[{",".join(items)}],{json.dumps(rest)[1:]}', sum(counts)


def _count(encoder: Encoder, body: EmbeddingRequest, texts: Sequence[str], start: int) -> list[int]:
    max_tokens = encoder.info.max_tokens
    counts = [encoder.count_query_tokens(text) for text in texts]
    for place, count in enumerate(counts, start):
        if count > max_tokens:
            param = "input" if isinstance(body.input, str) else f"input.{place}"
            message = f"Invalid '{param}': it has {count:,} tokens and the model sees {max_tokens:,}."
            raise ApiError(400, message, param=param, code="context_length_exceeded")
    return counts


def _encode(encoder: Encoder, body: EmbeddingRequest, texts: Sequence[str], start: int) -> str:
    vectors = encoder.encode_queries(texts).astype("<f4")
    in_base64 = body.encoding_format == "base64"
    values = [base64.b64encode(each.tobytes()).decode() if in_base64 else each.tolist() for each in vectors]
    items = [{"object": "embedding", "index": place, "embedding": value} for place, value in enumerate(values, start)]
    return ",".join(map(json.dumps, items))


def batches(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each batch of texts that have so many tokens."""
    start = tokens = 0
    for place, count in enumerate(counts):
        if place > start and (place - start == BATCH_SIZE or tokens + count > BATCH_TOKENS):
            yield start, place
            start, tokens = place, 0
        tokens += count
    yield start, len(counts)
