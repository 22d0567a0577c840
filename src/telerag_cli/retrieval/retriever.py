"""Searches an index of any size through a fast tier of any size: lookahead before the query, then the join.

`Retriever` searches for vectors, `Retrievals` before it for the texts of all questions at hand.
"""

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
from telerag_cli.config import DEFAULT_K, DEFAULT_NPROBE, Metric, SearchConfig
from telerag_cli.corpus.passages import Passage, Retrieved
from telerag_cli.errors import TeleragError, UsageError
from telerag_cli.index.artifact import Index
from telerag_cli.index.passages import Passages
from telerag_cli.index.scoring import Coarse, score_again
from telerag_cli.prefetch.order import interleave, prefetch_depth
from telerag_cli.prefetch.prefetcher import Prefetch, Prefetcher
from telerag_cli.retrieval.join import DiskJoin, Join, Probes, TwoEndsJoin
from telerag_cli.retrieval.report import JoinObserver, JoinReport
from telerag_cli.retrieval.split import ContentionEstimate
from telerag_cli.tiers.tier import FastTier
from telerag_cli.tracing import Tracer

EMBED = "embed"
MAX_SEARCHES = 32
"""Searches in one batch; each waits for the lists of all."""
MAX_HITS = 1 << 18
"""Results of one batch, over all its queries: a search that looks deep takes the time and the memory of few at once."""

T = TypeVar("T")
RESCORE = 4
"""Candidates per result that are re-ranked, where the index keeps vectors for it: Faiss's ``k_factor``."""


@dataclass(frozen=True)
class Search:
    """Queries that belong together, shape (n, dimension), and what was prefetched for them; the search ends it."""

    queries: FloatArray
    prefetches: tuple[Prefetch, ...] = ()


@dataclass(frozen=True)
class Neighbours:
    """The best passages of each query: scores and row numbers, (n, k), best first; row -1 where there is none."""

    scores: FloatArray
    rows: IntArray
    report: JoinReport


class Searcher(Protocol):
    """Searches an index for queries that are there."""

    index: Index

    def search_batch(self, searches: Sequence[Search], k: int, nprobe: int) -> list[Neighbours]:
        """Several searches at once; each finds what it would find alone.

        Raises:
            TeleragError: a list could not be read.
        """


def check_search(index: Index, k: int, nprobe: int) -> None:
    """Refuse a search that the index cannot answer.

    Raises:
        UsageError: ``nprobe`` exceeds the lists, or ``k`` the passages.
    """
    manifest = index.manifest
    for name, value, limit, what in (
        ("nprobe", nprobe, manifest.nlist, "lists"),
        ("k", k, manifest.ntotal, "passages"),
    ):
        if not 1 <= value <= limit:
            raise UsageError(
                f"{name} is {value:,} and the index has {limit:,} {what}.", remedy=f"Choose {name} from 1 to {limit:,}."
            )


def search_depth(index: Index, config: SearchConfig) -> tuple[int, int]:
    """``k`` and ``nprobe`` for this index: those of the settings, or 5 and 32, or all of a smaller index.

    Raises:
        UsageError: the index has fewer passages or lists than the settings ask for.
    """
    k = config.k or min(DEFAULT_K, index.manifest.ntotal)
    nprobe = config.nprobe or min(DEFAULT_NPROBE, index.manifest.nlist)
    check_search(index, k, nprobe)
    return k, nprobe


class Retriever:
    """A `Searcher` over a fast tier, with lookahead; the result depends on neither."""

    def __init__(
        self,
        index: Index,
        coarse: Coarse,
        tier: FastTier,
        *,
        cache_fraction: float = 0.5,
        rescore: int | None = None,
        budget_bytes: int | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Begin with nothing prefetched.

        Hot lists may hold ``cache_fraction`` of the arena. ``rescore`` candidates per result are re-ranked from the
        vectors that the index keeps, 0 for none; by default `RESCORE` if it keeps them. One prefetch may move
        ``budget_bytes``; without it, as much as there is time for.

        Raises:
            UsageError: re-ranking is asked for, and the index keeps no vectors.
        """
        if rescore and index.vectors is None:
            raise UsageError(
                f"--rescore is {rescore}, and {index.paths.root} keeps no vectors beside its lists.",
                remedy="Leave it out, or build the index with --keep-vectors.",
            )
        self._rescore = (RESCORE if rescore is None else rescore) if index.vectors is not None else 0
        self.index = index
        self.tier = tier
        self._coarse = coarse
        self._cache_fraction = cache_fraction
        self.budget_bytes = budget_bytes
        self._tracer = tracer or Tracer(enabled=False)
        self._prefetcher = Prefetcher(tier)
        self._contention = ContentionEstimate(tier.in_place.slowdown if tier.in_place else 1.0)
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="in place")

    def close(self) -> None:
        """Wait for what is under way and free the arena."""
        self._beside.shutdown()
        self.tier.close()

    @property
    def prefetches(self) -> int:
        """Prefetches that have not ended."""
        return self._prefetcher.count

    @property
    def slowdown(self) -> float:
        """How much longer both ends of a join take than their rates say; see `ContentionEstimate`."""
        return self._contention.slowdown

    def prefetch(self, queries: FloatArray, nprobe: int, *, refining: bool = False) -> Prefetch:
        """Start lookahead for queries like these, shape (n, dimension); ``refining`` says that `refine` will follow."""
        return self.prefetch_batch([queries], nprobe, refining=refining)[0]

    def prefetch_batch(self, searches: Sequence[FloatArray], nprobe: int, *, refining: bool = False) -> list[Prefetch]:
        """Start lookahead for several searches that belong together, each of queries of shape (n, dimension).

        To the cache they are one round. All orders are known before anything moves, so the link takes everyone's best
        lists, then everyone's second, and a list that several want once.
        """
        kept = self.tier.new_round(self._cache_fraction)
        depth = prefetch_depth(nprobe, 0.0, refining=refining)
        orders = [self.order(queries) for queries in searches]
        return self._prefetcher.start(orders, depth, nprobe, kept, self.budget_bytes)

    def refine(self, prefetch: Prefetch, queries: FloatArray, nprobe: int, fraction: float) -> None:
        """Follow these queries, shape (n, dimension), made when ``fraction`` of the expected text was written."""
        prefetch.follow(self.order(queries), prefetch_depth(nprobe, fraction, refining=True), fraction)

    def nearest(self, queries: FloatArray, count: int) -> IntArray:
        """The ``count`` lists nearest to each of these queries, shape (n, dimension): (n, count), nearest first."""
        return self._coarse.nearest(queries, count)

    def order(self, queries: FloatArray) -> IntArray:
        """The order in which lists are worth moving for queries like these, shape (n, dimension)."""
        return interleave([self._coarse.rank(query) for query in queries])

    def search(self, queries: FloatArray, k: int, nprobe: int, prefetch: Prefetch | None = None) -> Neighbours:
        """What ``faiss.IndexIVF`` finds with the same probes for queries (n, dimension); equal scores by row.

        Where candidates are re-ranked, they are what it finds for ``rescore * k``. See `search_batch` for the errors.
        """
        return self.search_batch([Search(queries, (prefetch,) if prefetch else ())], k, nprobe)[0]

    def search_batch(self, searches: Sequence[Search], k: int, nprobe: int) -> list[Neighbours]:
        """Several searches at once; each finds what it would find alone, and a list that two probe is moved once.

        Lookahead stops, what is in the arena is scored, and what is missing is moved or scored in place. Only moves
        that the queries need are waited for.

        Raises:
            TeleragError: a list could not be read; the prefetches have ended all the same.
        """
        observer = JoinObserver(self.tier.list_bytes, self._tracer)
        metric, vectors = self.index.manifest.metric, self.index.vectors
        prefetches = [prefetch for search in searches for prefetch in search.prefetches]
        for prefetch in prefetches:
            prefetch.stop()
        try:
            if not prefetches:
                self.tier.new_round(self._cache_fraction)
            queries = np.concatenate([search.queries for search in searches])
            probed = self._coarse.nearest(queries, nprobe)
            observer.probed()
            width = min(k * max(self._rescore, 1), self.index.manifest.ntotal)
            join = self._join(Probes(queries, probed, width, metric), observer)
            wanted = self._lists(probed)
            join.run(wanted.tolist())
            self.tier.used(wanted)
            scores, rows = join.scores, join.rows
            if self._rescore and vectors is not None:
                observer.joined()
                scores, rows = score_again(queries, rows, vectors, k, metric)
        finally:
            for prefetch in prefetches:
                prefetch.end()
        observer.ended()
        found, start = [], 0
        for search in searches:
            mine = slice(start, start := start + len(search.queries))
            report = observer.report(search.prefetches, self._lists(probed[mine]))
            found.append(Neighbours(scores[mine], rows[mine], report))
        return found

    def _join(self, probes: Probes, observer: JoinObserver) -> Join:
        place = self.tier.in_place
        if place is None:
            return DiskJoin(self.tier, probes, observer)
        return TwoEndsJoin(self.tier, probes, observer, place, self._beside, self._contention)

    def _lists(self, probed: IntArray) -> IntArray:
        """The distinct lists probed, without empty ones."""
        lists = np.unique(probed)
        kept: IntArray = lists[self.tier.list_bytes[lists] > 0]
        return kept


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
        """See `Finder`."""
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
