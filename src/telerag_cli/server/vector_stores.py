"""``/v1/vector_stores``: the index as OpenAI's one vector store, whose files are its passages."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response

from telerag_cli.arrays import DoubleArray, FloatArray
from telerag_cli.config import Metric
from telerag_cli.corpus.passages import Passage, Retrieved
from telerag_cli.retrieval.retriever import Retrievals
from telerag_cli.server.errors import INVALID, ApiError, shortened
from telerag_cli.server.filters import attributes, passes
from telerag_cli.server.replies import json_response, note
from telerag_cli.server.requests import VectorSearchRequest
from telerag_cli.server.responses import VectorStore, VectorStoreList, VectorStoreSearchPage
from telerag_cli.server.service import Service
from telerag_cli.server.streams import until_gone
from telerag_cli.server.validation import JsonRoute

STORE = "vs_telerag"
DEPTH_FACTOR = 4
"""How many times as deep each further look goes."""
MAX_CANDIDATES = 20_000
"""Of one request; reading them takes a second."""
READ_BATCH = 128
"""Passages read at once; others search between two batches."""
StoreId = Annotated[str, Path(json_schema_extra={"enum": [STORE]})]


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(route_class=JsonRoute, tags=["Retrieval"])
    turns = asyncio.Lock()

    @routes.get("/v1/vector_stores", response_model=VectorStoreList)
    async def list_vector_stores(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        before: str | None = None,
    ) -> dict[str, Any]:
        """List all vector stores: there is one, and nothing before or after it."""
        service.require_ready()
        stores = [] if after or before else [_describe(service)]
        only = STORE if stores else None
        return {"object": "list", "data": stores, "first_id": only, "last_id": only, "has_more": False}

    @routes.get("/v1/vector_stores/{vector_store_id}", response_model=VectorStore)
    async def retrieve_vector_store(vector_store_id: StoreId) -> dict[str, Any]:
        """Describe one of them."""
        service.require_ready()
        _check_store(vector_store_id)
        return _describe(service)

    @routes.post("/v1/vector_stores/{vector_store_id}/search", response_model=VectorStoreSearchPage)
    async def search_vector_store(vector_store_id: StoreId, body: VectorSearchRequest, request: Request) -> Response:
        """Find the passages nearest to a text, among those of the lists that the index probes for it.

        With filters, candidates of these lists are considered until enough have passed or none are left; passages of
        other lists are not found, even if they pass and nothing else does. After 20,000 candidates the search ends, and
        `has_more` says that some were not considered. A score is the inner product, or 1 / (1 + d)
        where the index compares by squared distance d.
        """
        service.require_ready()
        _check_store(vector_store_id)
        engine = service.engine
        finder = engine.shared.retrievals
        assert isinstance(finder, Retrievals)
        searching = search(finder, engine.retriever.index.manifest.metric, body, turns)
        found, complete = await until_gone(request, service.within(searching))
        note(request, outcome="done")
        page = {"object": "vector_store.search_results.page", "search_query": body.queries}
        return json_response(page | {"data": list(map(_result, found)), "has_more": not complete, "next_page": None})

    return routes


async def search(
    finder: Retrievals, metric: Metric, body: VectorSearchRequest, turns: asyncio.Lock
) -> tuple[list[Retrieved], bool]:
    """Return the best passages that pass a request's filter and threshold, with scores as clients see them.

    The flag says whether that is all there is, or all that was asked for. By ``turns`` one such search reads candidates
    at a time, so that between two batches the questions of others come, and not further searches.
    """
    options = body.ranking_options
    threshold = options.score_threshold if options else None
    passing: dict[int, Passage | None] = {}
    """The rows that were read: the passage if it passes."""
    k = body.max_num_results
    while True:
        ranking = await finder.rank(body.queries, k)
        scores = shown_scores(ranking.scores, metric)
        near = len(scores) if threshold is None else int((scores >= threshold).sum())
        hits = list(zip(ranking.rows[:near].tolist(), scores[:near].tolist(), strict=True))
        found: list[Retrieved] = []
        for start in range(0, near, READ_BATCH):
            batch = hits[start : start + READ_BATCH]
            if new := [row for row, _score in batch if row not in passing]:
                async with turns:
                    passages = await finder.read(new)
                for row, read in zip(new, passages, strict=True):
                    passing[row] = read if passes(body.filters, attributes(read.metadata)) else None
            found += [Retrieved(passage, *hit) for hit in batch if (passage := passing[hit[0]]) is not None]
            if len(found) >= body.max_num_results:
                return found[: body.max_num_results], True
        if len(scores) < k or near < len(scores):
            return found, True
        if k == MAX_CANDIDATES:
            return found, False
        k = min(k * DEPTH_FACTOR, MAX_CANDIDATES)


def shown_scores(scores: FloatArray, metric: Metric) -> DoubleArray:
    """Return scores of which larger is nearer: inner products as they are, squared distances d as 1 / (1 + d)."""
    exact = scores.astype(np.float64)
    return exact if metric is Metric.IP else 1 / (1 + np.maximum(exact, 0))


def _result(hit: Retrieved) -> dict[str, Any]:
    passage = hit.passage
    return {
        "file_id": passage.id,
        "filename": passage.name,
        "score": hit.score,
        "attributes": attributes(passage.metadata),
        "content": [{"type": "text", "text": passage.text}],
    }


def _check_store(name: str) -> None:
    if name != STORE:
        raise ApiError(404, f"No vector store found with id '{shortened(name)}'.", INVALID)


def _describe(service: Service) -> dict[str, Any]:
    index = service.engine.retriever.index
    passages = index.manifest.ntotal
    return {
        "id": STORE,
        "object": "vector_store",
        "created_at": int(service.started_at),
        "name": "telerag",
        "usage_bytes": int(index.list_bytes.sum()),
        "status": "completed",
        "expires_after": None,
        "expires_at": None,
        "file_counts": {"in_progress": 0, "completed": passages, "failed": 0, "cancelled": 0, "total": passages},
        "last_active_at": None,
        "metadata": {},
    }
