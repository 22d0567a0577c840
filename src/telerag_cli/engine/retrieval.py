"""Embeds and searches for all questions at hand: what is asked while one batch runs is the next batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.config import Metric
from telerag_cli.corpus.passages import Passage
from telerag_cli.errors import TeleragError
from telerag_cli.index.passages import Passages
from telerag_cli.pipelines.found import Retrieved
from telerag_cli.prefetch.prefetcher import Prefetch
from telerag_cli.retrieval.report import JoinReport
from telerag_cli.retrieval.retriever import Neighbours, Search, Searcher
from telerag_cli.tracing import Tracer

EMBED = "embed"
MAX_SEARCHES = 32
"""Searches in one batch; each waits for the lists of all."""
MAX_HITS = 1 << 18
"""Results of one batch, over all its queries: a search that looks deep takes the time and the memory of few at once."""

T = TypeVar("T")


class QueryEmbedder(Protocol):
    """Embeds questions the way the index's passages were embedded."""

    def encode_queries(self, texts: Sequence[str]) -> FloatArray:
        """Shape (len(texts), dimension); a text's vector does not depend on the others. From any thread."""

    def embed_approx(self, texts: Sequence[str]) -> FloatArray:
        """Rough embeddings, shape (len(texts), dimension), that take little from an LLM decoding meanwhile."""


@dataclass(frozen=True)
class Retrieval:
    """One retrieval: what was asked, what was found, and what it took."""

    queries: tuple[str, ...]
    found: list[Retrieved]
    join: JoinReport
    embed_s: float
    """For the batch that it was part of, as the join's times are."""


@dataclass(frozen=True)
class Ranking:
    """Rows of passages and their scores, shape (n,), each row once, best first; equal scores by row."""

    rows: IntArray
    scores: FloatArray


class Finder(Protocol):
    """Finds passages for texts."""

    async def find(self, queries: Sequence[str], prefetches: Sequence[Prefetch]) -> Retrieval:
        """The best passages for these queries together; the prefetches that prepared them end.

        Raises:
            TeleragError: it failed.
        """

    def close(self) -> None:
        """Wait for what runs and let go of what this alone uses."""


@dataclass(frozen=True, eq=False)
class _QueuedSearch(Generic[T]):
    queries: tuple[str, ...]
    prefetches: tuple[Prefetch, ...]
    k: int
    make: Callable[[Neighbours, float], T]
    """The answer from what was found and the seconds that embedding took; called in the thread."""
    answer: asyncio.Future[T] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Retrievals:
    """A queue and a thread. Nothing waits for others to come: a batch is what came while the one before it ran."""

    def __init__(
        self, embedder: QueryEmbedder, searcher: Searcher, passages: Passages, k: int, nprobe: int, tracer: Tracer
    ) -> None:
        self._embedder = embedder
        self._searcher = searcher
        self._passages = passages
        self._k = k
        self._nprobe = nprobe
        self._tracer = tracer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retrieve")
        self._waiting: list[_QueuedSearch[Any]] = []
        self._running: asyncio.Task[None] | None = None

    async def find(self, queries: Sequence[str], prefetches: Sequence[Prefetch]) -> Retrieval:
        """The best passages for these queries together; the prefetches that prepared them end.

        Raises:
            TeleragError: a list could not be read.
        """
        texts = tuple(queries)

        def retrieval(found: Neighbours, embed_s: float) -> Retrieval:
            best = self._best([found], self._k)
            rows, scores = best.rows.tolist(), best.scores.tolist()
            return Retrieval(texts, list(map(Retrieved, self._passages[rows], rows, scores)), found.report, embed_s)

        return await self._enqueue(_QueuedSearch(texts, tuple(prefetches), self._k, retrieval))

    async def rank(self, queries: Sequence[str], k: int) -> Ranking:
        """The best ``k`` passages for these queries together, as deep as anyone wants to look, without their texts.

        Fewer come back only if the lists that the queries probe hold no more. What others search at the same time finds
        what it would find alone: only searches of the same ``k`` are one batch, for ``k`` decides what is re-ranked.

        Raises:
            TeleragError: a list could not be read.
        """
        width = min(k, self._deepest)
        step = max(1, MAX_HITS // width)
        parts = [
            await self._enqueue(
                _QueuedSearch(tuple(queries[start : start + step]), (), width, lambda found, _embed_s: found)
            )
            for start in range(0, len(queries), step)
        ]
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._best, parts, k)

    async def read(self, rows: Sequence[int]) -> list[Passage]:
        """The passages of these rows, in the order asked for.

        Raises:
            ArtifactError: a row's bytes are damaged.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._passages.__getitem__, rows)

    def close(self) -> None:
        """Wait for what runs and stop the thread."""
        self._thread.shutdown()

    def _enqueue(self, asked: _QueuedSearch[T]) -> asyncio.Future[T]:
        self._waiting.append(asked)
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return asked.answer

    async def _run(self) -> None:
        """Search in batches until nobody waits."""
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                self._waiting = [asked for asked in self._waiting if not asked.answer.done()]
                batch = self._next_batch()
                self._waiting = [asked for asked in self._waiting if asked not in batch]
                results = await loop.run_in_executor(self._thread, self._search, batch)
                for asked, result in zip(batch, results, strict=True):
                    if asked.answer.done():
                        continue  # nobody waits for it any more
                    if isinstance(result, Exception):
                        asked.answer.set_exception(result)
                    else:
                        asked.answer.set_result(result)
        finally:
            self._running = None

    def _next_batch(self) -> list[_QueuedSearch[Any]]:
        """Who has waited longest, and others whose results are as many, as far as a batch goes."""
        batch: list[_QueuedSearch[Any]] = []
        hits = 0
        for asked in self._waiting:
            if asked.k != self._waiting[0].k:
                continue
            hits += len(asked.queries) * asked.k
            if batch and (len(batch) == MAX_SEARCHES or hits > MAX_HITS):
                break
            batch.append(asked)
        return batch

    def _search(self, batch: Sequence[_QueuedSearch[Any]]) -> list[Any]:
        """What each has asked for, or what went wrong with it; in the thread."""
        if not batch:
            return []
        texts = [query for asked in batch for query in asked.queries]
        try:
            started_s = time.perf_counter()
            with self._tracer.span(EMBED, f"{len(texts)} texts" if len(texts) > 1 else "text"):
                vectors = self._embedder.encode_queries(texts)
            embed_s = time.perf_counter() - started_s
            searches, start = [], 0
            for asked in batch:
                searches.append(Search(vectors[start : (start := start + len(asked.queries))], asked.prefetches))
            found = self._searcher.search_batch(searches, batch[0].k, self._nprobe)
            return [asked.make(each, embed_s) for asked, each in zip(batch, found, strict=True)]
        except Exception as error:
            if len(batch) == 1 or not isinstance(error, TeleragError):
                return [error] * len(batch)
            # What one of them needs may be damaged and what the others need not.
            return [result for asked in batch for result in self._search([asked])]

    @cached_property
    def _deepest(self) -> int:
        """No query has more candidates than this."""
        return int(np.sort(self._searcher.index.sizes)[-self._nprobe :].sum())

    def _best(self, parts: Sequence[Neighbours], k: int) -> Ranking:
        """The best ``k`` passages over all queries of these searches, each once, best first."""
        scores = np.concatenate([found.scores.ravel() for found in parts])
        rows = np.concatenate([found.rows.ravel() for found in parts])
        scores, rows = scores[rows >= 0], rows[rows >= 0]
        larger_is_nearer = self._searcher.index.manifest.metric is Metric.IP
        order = np.lexsort((rows, -scores if larger_is_nearer else scores))
        _rows, firsts = np.unique(rows[order], return_index=True)
        kept = order[np.sort(firsts)[:k]]
        return Ranking(rows[kept], scores[kept])
