"""Searches an index of any size through a fast tier of any size: lookahead before the query, then the join."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.errors import UsageError
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse, score_again
from telerag_cli.prefetch.order import interleave, prefetch_depth
from telerag_cli.prefetch.prefetcher import Prefetch, Prefetcher
from telerag_cli.retrieval.join import DiskJoin, Join, Probes, TwoEndsJoin
from telerag_cli.retrieval.report import JoinObserver, JoinReport
from telerag_cli.retrieval.split import ContentionEstimate
from telerag_cli.tiers.tier import FastTier
from telerag_cli.tracing import Tracer

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

        Args:
            index: the index.
            coarse: its coarse quantizer.
            tier: where its lists are scored.
            cache_fraction: share of the arena that hot lists may hold.
            rescore: candidates per result that are re-ranked from the vectors that the index keeps, 0 for none; by
                default `RESCORE` if it keeps them.
            budget_bytes: what one prefetch may move; without it, as much as there is time for.
            tracer: where joins are recorded.

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
        """What ``faiss.IndexIVF`` finds with the same probes; equal scores are ordered by row.

        Where candidates are re-ranked, they are what it finds for ``rescore * k``.

        Args:
            queries: (n, dimension).
            k: passages per query.
            nprobe: lists probed per query.
            prefetch: the lookahead that prepared this search; it ends.

        Raises:
            TeleragError: a list could not be read.
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
