"""Retrieval over a fast tier: rounds of lookahead before it, and the join when the query is there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from queue import Empty, SimpleQueue

import numpy as np

from telerag_cli.config import Metric
from telerag_cli.errors import TeleragError, UsageError
from telerag_cli.index.artifact import FloatArray, Index, IntArray
from telerag_cli.index.scoring import Coarse, best
from telerag_cli.lookahead.order import interleave, reach
from telerag_cli.lookahead.plan import Plan
from telerag_cli.lookahead.round import Mover, Round
from telerag_cli.tiers.base import FastTier
from telerag_cli.tracing import Tracer

JOIN = "join"
RETRY_S = 0.002


@dataclass(frozen=True)
class JoinReport:
    """What one retrieval found in fast memory, what it read, and how long it took."""

    lists_wanted: int
    """Distinct lists probed, empty ones aside."""
    lists_hit: int
    """Of those, in fast memory when the query arrived."""
    lists_coming: int
    """Of those, on their way when the query arrived."""
    lists_missed: int
    """Of those, read because the query needed them."""
    lists_moved: int
    """Lists that lookahead moved in this round."""
    lists_wasted: int
    """Of those, not probed."""
    bytes_wanted: int
    bytes_moved: int
    bytes_missed: int
    orders: int
    """Orders that lookahead followed: the first, and one for each refinement."""
    coarse_s: float
    score_s: float
    join_s: float
    """From the query's arrival to its results, all included."""

    @classmethod
    def count_names(cls) -> list[str]:
        """Names of the lists and bytes counted."""
        return [entry.name for entry in fields(cls) if not entry.name.endswith("_s")]

    def counts(self) -> dict[str, int]:
        """The lists and bytes, for a run's output line."""
        return {name: getattr(self, name) for name in self.count_names()}


@dataclass(frozen=True)
class Search:
    """Queries that belong together, shape (n, dimension), and the lookahead that prepared them; it ends with the search."""

    queries: FloatArray
    rounds: tuple[Round, ...] = ()


@dataclass(frozen=True)
class Found:
    """The best passages of each query: scores and row numbers, (n, k), best first; row -1 where there is none."""

    scores: FloatArray
    rows: IntArray
    report: JoinReport


class Retriever:
    """Searches an index of any size through a fast tier of any size; the result depends on neither."""

    def __init__(self, index: Index, coarse: Coarse, tier: FastTier, *, cache_fraction: float = 0.5,
                 tracer: Tracer | None = None) -> None:  # fmt: skip
        self.index = index
        self.tier = tier
        self._coarse = coarse
        self._cache_fraction = cache_fraction
        self._tracer = tracer or Tracer(enabled=False)
        self._mover = Mover(tier)

    @property
    def rounds(self) -> int:
        """Lookahead rounds that have not ended."""
        return self._mover.rounds

    def check(self, k: int, nprobe: int) -> None:
        """Refuse a search that the index cannot answer.

        Raises:
            UsageError: ``nprobe`` exceeds the lists, or ``k`` the passages.
        """
        manifest = self.index.manifest
        for name, value, limit, what in (
            ("nprobe", nprobe, manifest.nlist, "lists"),
            ("k", k, manifest.ntotal, "passages"),
        ):
            if not 1 <= value <= limit:
                raise UsageError(
                    f"{name} is {value:,} and the index has {limit:,} {what}.",
                    remedy=f"Choose {name} from 1 to {limit:,}.",
                )

    def begin(self, queries: FloatArray, nprobe: int, *, refining: bool = False) -> Round:
        """Start lookahead for queries expected to be like these, shape (n, dimension).

        ``refining`` says that `refine` will follow, so that this order is only a start.
        """
        ahead = self._mover.start(Plan(self.tier.nlist, self.tier.new_round(self._cache_fraction)))
        ahead.follow(self.order(queries), reach(nprobe, 0.0, refining=refining))
        return ahead

    def refine(self, ahead: Round, queries: FloatArray, nprobe: int, fraction: float) -> None:
        """Follow these queries, shape (n, dimension), made when ``fraction`` of the expected text was written."""
        ahead.follow(self.order(queries), reach(nprobe, fraction, refining=True))

    def order(self, queries: FloatArray) -> IntArray:
        """The order in which lists are worth moving for queries like these, shape (n, dimension)."""
        return interleave([self._coarse.rank(query) for query in queries])

    def search(self, queries: FloatArray, k: int, nprobe: int, ahead: Round | None = None) -> Found:
        """What ``faiss.IndexIVF`` finds with the same probes; equal scores are ordered by row.

        Args:
            queries: (n, dimension).
            k: passages per query.
            nprobe: lists probed per query.
            ahead: the lookahead that prepared this search; it ends.

        Raises:
            TeleragError: a list could not be read.
        """
        return self.search_together([Search(queries, (ahead,) if ahead else ())], k, nprobe)[0]

    def search_together(self, searches: Sequence[Search], k: int, nprobe: int) -> list[Found]:
        """Several searches at once; each finds what it would find alone, and a list that two of them probe is moved once.

        The join: stop lookahead, score what is in the arena, and score what is missing as it arrives. Only moves that
        the queries need are waited for.

        Raises:
            TeleragError: a list could not be read; the rounds have ended all the same.
        """
        arrived_s = time.perf_counter()
        rounds = [ahead for search in searches for ahead in search.rounds]
        for ahead in rounds:
            ahead.stop()
        try:
            if not rounds:
                self.tier.new_round(self._cache_fraction)
            queries = np.concatenate([search.queries for search in searches])
            _scores, probes = self._coarse.probe(queries, nprobe)
            coarse_s = time.perf_counter() - arrived_s
            join = _Join(self.tier, self.index.manifest.metric, queries, probes, k, self._tracer)
            wanted = self._lists(probes)
            join.run(wanted.tolist())
            self.tier.used(wanted)
        finally:
            for ahead in rounds:
                ahead.end()
        ended_s = time.perf_counter()
        found, start = [], 0
        for search in searches:
            rows = slice(start, start := start + len(search.queries))
            report = self._report(search, self._lists(probes[rows]), join, coarse_s, ended_s - arrived_s)
            found.append(Found(join.scores[rows], join.rows[rows], report))
            self._tracer.add(JOIN, "join", arrived_s, ended_s, **report.counts())
        return found

    def _lists(self, probes: IntArray) -> IntArray:
        """The distinct lists probed, empty ones aside."""
        lists = np.unique(probes)
        kept: IntArray = lists[self.tier.extents[lists] > 0]
        return kept

    def _report(
        self, search: Search, wanted: IntArray, join: _Join, coarse_s: float, join_s: float
    ) -> JoinReport:
        """What the join was for one of its searches; what two of them needed counts for both."""
        extents = self.tier.extents
        moved = np.array([list_no for ahead in search.rounds for list_no in ahead.moved], np.int64)
        missed = wanted[np.isin(wanted, join.missed)]
        coming = int(np.isin(wanted, join.coming).sum())
        return JoinReport(
            lists_wanted=len(wanted), lists_hit=len(wanted) - len(missed) - coming, lists_coming=coming, lists_missed=len(missed),
            lists_moved=len(moved), lists_wasted=int((~np.isin(moved, wanted)).sum()),
            bytes_wanted=int(extents[wanted].sum()), bytes_moved=int(extents[moved].sum()), bytes_missed=int(extents[missed].sum()),
            orders=sum(ahead.orders for ahead in search.rounds),
            coarse_s=coarse_s, score_s=join.score_s, join_s=join_s)  # fmt: skip


class _Join:
    """The way of some queries through hits, arrivals and misses, keeping the best so far."""

    def __init__(
        self, tier: FastTier, metric: Metric, queries: FloatArray, probes: IntArray, k: int, tracer: Tracer
    ) -> None:
        self._tier = tier
        self._metric = metric
        self._queries = queries
        self._probes = probes
        self._k = k
        self._tracer = tracer
        self._arrivals: SimpleQueue[tuple[int, TeleragError | None]] = SimpleQueue()
        worst = -np.inf if metric is Metric.IP else np.inf
        self.scores: FloatArray = np.full((len(queries), k), worst, np.float32)
        self.rows: IntArray = np.full((len(queries), k), -1, np.int64)
        self.coming: list[int] = []
        self.missed: list[int] = []
        self.score_s = 0.0

    def run(self, wanted: Sequence[int]) -> None:
        pending = list(wanted)
        under_way = 0
        error: TeleragError | None = None
        first = True
        while pending or under_way:
            if pending and error is None:
                claim = self._tier.claim(pending, self._told)
                under_way += len(claim.coming) + len(claim.started)
                if first:
                    # What was refused is missed too, however it gets here later: other lookahead may bring it.
                    self.coming, self.missed = claim.coming, claim.started + claim.refused
                    first = False
                pending = claim.refused
                self._score(claim.hits)
            if under_way:
                here, trouble = self._next_arrivals()
                under_way -= len(here) + len(trouble)
                self._score(here)
                error = error or next(iter(trouble), None)
            elif pending and error is None:
                # Only moves that this search does not wait for stand in the way; they end by themselves.
                time.sleep(RETRY_S)
            if error is not None:
                pending = []
        if error is not None:
            raise error

    def _told(self, list_no: int, error: TeleragError | None) -> None:
        self._arrivals.put((list_no, error))

    def _next_arrivals(self) -> tuple[list[int], list[TeleragError]]:
        """At least one arrival, and all that came with it: fewer and larger calls of the scanner."""
        told = [self._arrivals.get()]
        try:
            while True:
                told.append(self._arrivals.get_nowait())
        except Empty:
            pass
        return [list_no for list_no, error in told if error is None], [
            error for _list_no, error in told if error
        ]

    def _score(self, lists: Sequence[int]) -> None:
        if not lists:
            return
        started_s = time.perf_counter()
        chosen = np.array(lists, np.int64)
        single = len(self._queries) == 1
        keys = chosen[None] if single else np.where(np.isin(self._probes, chosen), self._probes, -1)
        scores, rows = self._tier.score(self._queries, keys, self._k)
        self._tier.release(lists)
        self.scores, self.rows = best(np.concatenate([self.scores, scores], 1), np.concatenate([self.rows, rows], 1),
                                      self._k, self._metric)  # fmt: skip
        ended_s = time.perf_counter()
        self.score_s += ended_s - started_s
        self._tracer.add(JOIN, f"score {len(lists)} lists", started_s, ended_s)
