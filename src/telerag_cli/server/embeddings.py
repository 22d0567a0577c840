"""``POST /v1/embeddings``: vectors of texts, made as those of questions are."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

from fastapi import APIRouter, Request, Response

from telerag_cli.engine.retrieval import QueryEmbedder
from telerag_cli.server.errors import ApiError
from telerag_cli.server.protocol import EmbeddingList, EmbeddingRequest
from telerag_cli.server.replies import note
from telerag_cli.server.service import Service, no_model
from telerag_cli.server.streams import until_gone

PIECE = 32
PIECE_TOKENS = 1024
"""Texts embedded at once, and their tokens. Between two pieces others have their turn, questions too, and a request whose
client is gone ends."""


class EncoderLimits(Protocol):
    """What is known of a model."""

    @property
    def max_tokens(self) -> int:
        """Tokens of a text that it sees."""


class Encoder(QueryEmbedder, Protocol):
    """An embedder that tells how much of a text it sees."""

    @property
    def info(self) -> EncoderLimits:
        """What is known of it."""

    def count_query_tokens(self, text: str) -> int:
        """Tokens of a text as the model would see it untruncated, its prompt for queries included."""


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["Retrieval"])
    turns = asyncio.Lock()

    @routes.post("/v1/embeddings", response_model=EmbeddingList)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Embed texts as the index's questions are embedded; a text longer than the model sees is refused."""
        service.require_ready()
        _check_model(body, service)
        texts = [body.input] if isinstance(body.input, str) else body.input
        work = _Work(cast("Encoder", service.engine.embedder), texts, body, turns)
        note(request, model=body.model)
        data = await until_gone(request, service.within(work.done()))
        note(request, prompt_tokens=work.tokens, outcome="done")
        return Response(data, media_type="application/json")

    return routes


def _check_model(body: EmbeddingRequest, service: Service) -> None:
    if body.model in service.models and body.model != service.embedder_name:
        raise ApiError(
            404,
            f"The model `{body.model}` answers and makes no embeddings; `{service.embedder_name}` makes them.",
            param="model",
            code="model_not_found",
        )
    if body.model != service.embedder_name:
        raise no_model(body.model)
    dimension = service.engine.retriever.index.manifest.dimension
    if body.dimensions not in (None, dimension):
        raise ApiError(
            400,
            f"Invalid 'dimensions': it is {body.dimensions} and the model makes vectors of {dimension}.",
            param="dimensions",
            code="invalid_value",
        )


class _Work:
    """The embedding of one request's texts, a piece at a time."""

    def __init__(self, encoder: Encoder, texts: Sequence[str], body: EmbeddingRequest, turns: asyncio.Lock) -> None:
        self._counts: list[int] = []
        self._encoder = encoder
        self._texts = texts
        self._body = body
        self._turns = turns

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(self._counts)

    async def done(self) -> str:
        """The response's JSON; it is written in pieces too, for a large one would hold up the event loop.

        Raises:
            ApiError: a text is longer than the model sees.
        """
        for start in range(0, len(self._texts), PIECE):
            async with self._turns:
                await asyncio.to_thread(self._count, start)
        items = []
        for start, end in pieces(self._counts):
            async with self._turns:
                items.append(await asyncio.to_thread(self._embed, start, end))
        rest = {"model": self._body.model, "usage": {"prompt_tokens": self.tokens, "total_tokens": self.tokens}}
        return f'{{"object":"list","data":[{",".join(items)}],{json.dumps(rest)[1:]}'

    def _count(self, start: int) -> None:
        most = self._encoder.info.max_tokens
        for place, text in enumerate(self._texts[start : start + PIECE], start):
            count = self._encoder.count_query_tokens(text)
            if count > most:
                param = "input" if isinstance(self._body.input, str) else f"input.{place}"
                raise ApiError(
                    400,
                    f"Invalid '{param}': it has {count:,} tokens and the model sees {most:,}.",
                    param=param,
                    code="context_length_exceeded",
                )
            self._counts.append(count)

    def _embed(self, start: int, end: int) -> str:
        vectors = self._encoder.encode_queries(self._texts[start:end]).astype("<f4")
        in_base64 = self._body.encoding_format == "base64"
        return ",".join(
            json.dumps(
                {
                    "object": "embedding",
                    "index": place,
                    "embedding": base64.b64encode(vector.tobytes()).decode() if in_base64 else vector.tolist(),
                }
            )
            for place, vector in enumerate(vectors, start)
        )


def pieces(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of each piece of texts that have so many tokens."""
    start = tokens = 0
    for place, count in enumerate(counts):
        if place > start and (place - start == PIECE or tokens + count > PIECE_TOKENS):
            yield start, place
            start, tokens = place, 0
        tokens += count
    yield start, len(counts)
