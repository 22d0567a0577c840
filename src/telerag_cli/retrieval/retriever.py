"""Retrieval over a fast tier: rounds of lookahead before it, and the join when the query is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np

from telerag_cli.arrays import BoolArray, DoubleArray, FloatArray, IntArray
from telerag_cli.config import Metric
from telerag_cli.errors import ResourceError, TeleragError, UsageError
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse, faiss_threads, merge, nothing, score_again
from telerag_cli.prefetch.order import interleave, prefetch_depth
from telerag_cli.prefetch.prefetcher import Order, Prefetch, Prefetcher, Window
from telerag_cli.prefetch.queue import PrefetchQueue
from telerag_cli.retrieval.split import ContentionEstimate, Ends, Misses
from telerag_cli.tiers.base import FastTier, InPlace, PinResult
from telerag_cli.tracing import Tracer

JOIN = "join"
IN_PLACE = "in place"
RETRY_S = 0.002
RESCORE = 4
"""Candidates a result that are scored again, where the index keeps vectors for it: Faiss's ``k_factor``."""


@dataclass(frozen=True, eq=False)
class JoinTrace:
    """When what happened in one retrieval, for whoever draws it.

    Times are ``time.perf_counter`` seconds of the process that searched. It is about this search alone, whatever was
    searched together with it; only that the times of scoring are those of all.
    """

    arrived_s: float
    """When the query was there."""
    ended_s: float
    """When its results were."""
    orders: tuple[Order, ...]
    """That its lookahead followed."""
    wanted: IntArray
    """The distinct lists probed, empty ones aside, shape (lists_wanted,)."""
    moved: IntArray
    """Lists that its lookahead moved, in order of arrival for each of its rounds, shape (lists_moved,)."""
    moved_s: DoubleArray
    """When each of them arrived."""
    fetched: IntArray
    """Lists wanted that the join began to move because they were missed; others of those missed were scored in place or came
    with somebody's lookahead after all."""
    scored_s: DoubleArray
    """Begin and end of each call of a scorer that scored a list of this search, shape (n, 2)."""
    scored: IntArray
    """How many of its lists each of them scored, shape (n,)."""
    scored_in_place: BoolArray
    """Which of them scored in the slow tier, shape (n,)."""
    again_s: float
    """Seconds before the end in which candidates were scored again."""


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
    """Of those, neither: moved because the query needed them, or scored where they lie."""
    lists_moved: int
    """Lists that lookahead moved in this round."""
    lists_wasted: int
    """Of those, not probed."""
    bytes_wanted: int
    bytes_moved: int
    bytes_missed: int
    lists_in_place: int
    """Of those missed, scored where they lie in the slow tier."""
    lists_failed: int
    """Times that a list could not be brought to fast memory, by lookahead or at the join, or not be scored there."""
    orders: int
    """Orders that lookahead followed: the first, and one for each refinement."""
    coarse_s: float
    score_s: float
    join_s: float
    """From the query's arrival to its results, all included."""
    window: Window | None = None
    """Of the lookahead that prepared it, if any did."""
    course: JoinTrace | None = field(default=None, compare=False, repr=False)
    """How it went, where there is a fast tier."""

    @classmethod
    def count_names(cls) -> list[str]:
        """Names of the lists and bytes counted."""
        return [entry.name for entry in fields(cls) if entry.name.startswith(("lists_", "bytes_", "orders"))]

    @staticmethod
    def failures(count: int) -> str:
        """What a user should know of so many of `lists_failed`."""
        return f"{count:,} times a list could not be brought to fast memory or scored there; that cost time and changed no result."

    def counts(self) -> dict[str, int]:
        """The lists and bytes, for a run's output line."""
        return {name: getattr(self, name) for name in self.count_names()}


@dataclass(frozen=True)
class Search:
    """Queries that belong together, shape (n, dimension), and the lookahead that prepared them; it ends with the search."""

    queries: FloatArray
    rounds: tuple[Prefetch, ...] = ()


@dataclass(frozen=True)
class Found:
    """The best passages of each query: scores and row numbers, (n, k), best first; row -1 where there is none."""

    scores: FloatArray
    rows: IntArray
    report: JoinReport


class Searcher(Protocol):
    """Searches an index for queries that are there."""

    index: Index

    def search_together(self, searches: Sequence[Search], k: int, nprobe: int) -> list[Found]:
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
    """Searches an index of any size through a fast tier of any size; the result depends on neither."""

    def __init__(
        self,
        index: Index,
        coarse: Coarse,
        tier: FastTier,
        *,
        cache_fraction: float = 0.5,
        rescore: int | None = None,
        budget_bytes: int | None = None,
        link_share: float | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Begin.

        Args:
            index: the index.
            coarse: its coarse quantizer.
            tier: where its lists are scored.
            cache_fraction: share of the arena that hot lists may hold.
            rescore: candidates a result that are scored again from the vectors that the index keeps, 0 for none; by
                default `RESCORE` if it keeps them.
            budget_bytes: that lookahead may move in one round; without it, as much as there is time for.
            link_share: share of the misses, in lists, that the link takes where they could be scored in place too; by
                default what should end soonest. For measuring what that is worth.
            tracer: where joins are recorded.

        Raises:
            UsageError: re-scoring is asked for, and the index keeps no vectors.
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
        self._link_share = link_share
        self._tracer = tracer or Tracer(enabled=False)
        self._mover = Prefetcher(tier)
        self._together = ContentionEstimate(tier.in_place.slowdown if tier.in_place else 1.0)
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="in place")

    def close(self) -> None:
        """Wait for what is under way and free the arena."""
        self._beside.shutdown()
        self.tier.close()

    @property
    def rounds(self) -> int:
        """Lookahead rounds that have not ended."""
        return self._mover.rounds

    @property
    def slowdown(self) -> float:
        """How much longer both ends of a join take side by side than the rates of each say; see `ContentionEstimate`."""
        return self._together.slowdown

    def begin(self, queries: FloatArray, nprobe: int, *, refining: bool = False) -> Prefetch:
        """Start lookahead for queries expected to be like these, shape (n, dimension).

        ``refining`` says that `refine` will follow, so that this order is only a start.
        """
        return self.begin_each([queries], nprobe, refining=refining)[0]

    def begin_each(self, searches: Sequence[FloatArray], nprobe: int, *, refining: bool = False) -> list[Prefetch]:
        """Start lookahead for several searches that belong together, each of queries of shape (n, dimension).

        To the cache they are one round. All orders are known before anything moves, so the link takes everyone's best
        lists, then everyone's second, and a list that several want once.
        """
        kept = self.tier.new_round(self._cache_fraction)
        orders = [self.order(queries) for queries in searches]
        rounds = [self._mover.start(PrefetchQueue(self.tier.list_bytes, kept, self.budget_bytes)) for _ in orders]
        self._mover.begin(
            list(zip(rounds, orders, strict=True)), prefetch_depth(nprobe, 0.0, refining=refining), nprobe
        )
        return rounds

    def nearest(self, queries: FloatArray, count: int) -> IntArray:
        """The ``count`` lists nearest to each of these queries, shape (n, dimension): (n, count), nearest first."""
        return self._coarse.nearest(queries, count)

    def refine(self, ahead: Prefetch, queries: FloatArray, nprobe: int, fraction: float) -> None:
        """Follow these queries, shape (n, dimension), made when ``fraction`` of the expected text was written."""
        ahead.follow(self.order(queries), prefetch_depth(nprobe, fraction, refining=True), fraction)

    def order(self, queries: FloatArray) -> IntArray:
        """The order in which lists are worth moving for queries like these, shape (n, dimension)."""
        return interleave([self._coarse.rank(query) for query in queries])

    def search(self, queries: FloatArray, k: int, nprobe: int, ahead: Prefetch | None = None) -> Found:
        """What ``faiss.IndexIVF`` finds with the same probes; equal scores are ordered by row.

        Where candidates are scored again, they are what it finds for ``rescore * k``.

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

        The join: stop lookahead, score what is in the arena, and deal with what is missing, by moving it and, where
        that is possible, by scoring it in place. Only moves that the queries need are waited for.

        Raises:
            TeleragError: a list could not be read; the rounds have ended all the same.
        """
        arrived_s = time.perf_counter()
        manifest = self.index.manifest
        rounds = [ahead for search in searches for ahead in search.rounds]
        for ahead in rounds:
            ahead.stop()
        try:
            if not rounds:
                self.tier.new_round(self._cache_fraction)
            queries = np.concatenate([search.queries for search in searches])
            _scores, probes = self._coarse.probe(queries, nprobe)
            coarse_s = time.perf_counter() - arrived_s
            width = min(k * max(self._rescore, 1), manifest.ntotal)
            join = _Join(
                self.tier,
                manifest.metric,
                queries,
                probes,
                width,
                self._tracer,
                self._beside,
                self._together,
                self._link_share,
            )
            wanted = self._lists(probes)
            join.run(wanted.tolist())
            self.tier.used(wanted)
            joined_s = time.perf_counter()
            if self._rescore and self.index.vectors is not None:
                vectors = self.index.vectors
                join.scores, join.rows = score_again(queries, join.rows, vectors, k, manifest.metric)
        finally:
            for ahead in rounds:
                ahead.end()
        ended_s = time.perf_counter()
        times = _Times(arrived_s, coarse_s, joined_s, ended_s)
        found, start = [], 0
        for search in searches:
            rows = slice(start, start := start + len(search.queries))
            report = self._report(search, self._lists(probes[rows]), join, times)
            found.append(Found(join.scores[rows], join.rows[rows], report))
            if self._tracer.wanted:
                self._tracer.add(JOIN, "join", arrived_s, ended_s, **report.counts())
        return found

    def _lists(self, probes: IntArray) -> IntArray:
        """The distinct lists probed, empty ones aside."""
        lists = np.unique(probes)
        kept: IntArray = lists[self.tier.list_bytes[lists] > 0]
        return kept

    def _mask(self, lists: Sequence[int] | IntArray) -> BoolArray:
        """The lists as a mask, shape (nlist,)."""
        mask: BoolArray = np.zeros(self.tier.nlist, np.bool_)
        mask[np.asarray(lists, np.int64)] = True
        return mask

    def _report(self, search: Search, wanted: IntArray, join: _Join, times: _Times) -> JoinReport:
        """What the join was for one of its searches; what two of them needed counts for both."""
        list_bytes = self.tier.list_bytes
        arrivals = [ahead.arrivals() for ahead in search.rounds]
        moved = np.concatenate([np.empty(0, np.int64), *(numbers for numbers, _arrived_s in arrivals)])
        moved_s = np.concatenate([np.empty(0), *(arrived_s for _numbers, arrived_s in arrivals)])
        missed, failed, coming, fetched = (
            wanted[self._mask(lists)[wanted]] for lists in (join.missed, join.failed, join.coming, join.fetched)
        )
        orders = tuple(order for ahead in search.rounds for order in ahead.followed)
        again_s = times.ended_s - times.joined_s if self._rescore else 0.0
        course = JoinTrace(
            times.arrived_s, times.ended_s, orders, wanted, moved, moved_s, fetched, *join.pieces_with(wanted), again_s
        )
        return JoinReport(
            lists_wanted=len(wanted),
            lists_hit=len(wanted) - len(missed) - len(coming),
            lists_coming=len(coming),
            lists_missed=len(missed),
            lists_moved=len(moved),
            lists_wasted=len(moved) - int(self._mask(wanted)[moved].sum()),
            bytes_wanted=int(list_bytes[wanted].sum()),
            bytes_moved=int(list_bytes[moved].sum()),
            bytes_missed=int(list_bytes[missed].sum()),
            lists_in_place=int(self._mask(join.in_place)[missed].sum()),
            lists_failed=len(failed) + sum(ahead.failed for ahead in search.rounds),
            orders=sum(ahead.orders for ahead in search.rounds),
            coarse_s=times.coarse_s,
            score_s=join.score_s,
            join_s=times.ended_s - times.arrived_s,
            window=search.rounds[0].window if search.rounds else None,
            course=course,
        )


@dataclass(frozen=True)
class _Times:
    """Of a join, in ``time.perf_counter`` seconds; how long it took to find the lists to probe."""

    arrived_s: float
    coarse_s: float
    joined_s: float
    """When all lists were scored."""
    ended_s: float


@dataclass(frozen=True)
class _Arrived:
    """Lists that are in fast memory now, or the error that kept them out."""

    lists: Sequence[int]
    error: TeleragError | None = None


@dataclass(frozen=True)
class _Piece:
    """A call of a scorer."""

    start_s: float
    end_s: float
    lists: Sequence[int]
    in_place: bool


@dataclass(frozen=True)
class _Scored:
    """What scoring some lists in place gave; nothing when that end has stopped."""

    piece: _Piece
    scores: FloatArray
    rows: IntArray


def _call(function: Callable[..., object], *arguments: object) -> None:
    function(*arguments)


class _Join:
    """The way of some queries through hits, arrivals and misses, keeping the best so far.

    Where the slow tier can be scored in place, misses are dealt with from two ends: the link moves from one, and a
    thread beside this one scores from the other. What cannot be moved, or not be scored where it was moved to, is
    scored in place too.
    """

    def __init__(
        self,
        tier: FastTier,
        metric: Metric,
        queries: FloatArray,
        probes: IntArray,
        k: int,
        tracer: Tracer,
        beside: Executor,
        together: ContentionEstimate,
        link_share: float | None = None,
    ) -> None:
        self._tier = tier
        self._metric = metric
        self._queries = queries
        self._probes = probes
        self._k = k
        self._tracer = tracer
        self._start: Callable[..., object] = beside.submit
        self._together = together
        self._link_share = link_share
        self._events: SimpleQueue[_Arrived | _Scored | BaseException | None] = SimpleQueue()
        self.scores, self.rows = nothing(len(queries), k, metric)
        self.coming: list[int] = []
        self.missed: list[int] = []
        self.fetched: list[int] = []
        self.in_place: list[int] = []
        self.failed: list[int] = []
        self.score_s = 0.0
        self._pieces: list[_Piece] = []
        self._coming_now = 0
        self._scoring_beside = False
        self._error: BaseException | None = None

    def run(self, wanted: Sequence[int]) -> None:
        claim = self._tier.claim(wanted, self._told, move=self._tier.in_place is None)
        self._coming_now = len(claim.coming) + len(claim.started)
        # What found no room is missed too, however it gets here later: other lookahead may bring it.
        self.coming, self.missed = claim.coming, claim.started + claim.absent
        self.fetched.extend(claim.started)
        self._misses = self._row_of(claim.absent)
        # With nothing to do beside it, scoring in place needs no thread of its own, nor Faiss others than it has just
        # used.
        if self._misses.ends is Ends.IN_PLACE and not (claim.hits or self._coming_now):
            self._start = _call
        began_s = time.perf_counter()
        self._go_on()
        self._score(claim.hits)
        while self._coming_now or self._scoring_beside or (len(self._misses) and self._error is None):
            if self._coming_now or self._scoring_beside:
                self._take_in(self._next_events())
            else:
                # Only moves that this search does not wait for stand in the way; they end by themselves.
                time.sleep(RETRY_S)
                self._misses.room()
            self._go_on()
        if self._error is not None:
            raise self._error
        if self._tier.in_place and claim.absent:
            self._learn(claim, time.perf_counter() - began_s)

    def pieces_with(self, wanted: IntArray) -> tuple[DoubleArray, IntArray, BoolArray]:
        """The calls of scorers that scored any of these lists: begin and end, how many of these, and whether in place."""
        counts = np.bincount(self._piece_of[wanted] + 1, minlength=len(self._pieces) + 1)[1:]
        there = np.flatnonzero(counts)
        pieces = [self._pieces[number] for number in there.tolist()]
        times = np.array([(piece.start_s, piece.end_s) for piece in pieces], np.float64).reshape(-1, 2)
        return times, counts[there], np.array([piece.in_place for piece in pieces], np.bool_)

    @cached_property
    def _piece_of(self) -> IntArray:
        """Which piece scored each list, shape (nlist,); -1 for none."""
        numbers: IntArray = np.full(self._tier.nlist, -1, np.int64)
        for number, piece in enumerate(self._pieces):
            numbers[np.asarray(piece.lists, np.int64)] = number
        return numbers

    def _learn(self, claim: PinResult, took_s: float) -> None:
        """Whether two ends are better than one, from a join in which there was little else to do and nothing went wrong."""
        if len(claim.absent) <= len(claim.hits) + len(claim.coming) or self.failed:
            return
        if self._misses.ends is Ends.BOTH:
            self._together.observe(self._misses.expected_s, took_s)
        else:
            self._together.fade()

    def _row_of(self, absent: Sequence[int]) -> Misses:
        nbytes = self._tier.list_bytes[absent].astype(np.float64)
        place = self._tier.in_place
        if place is None:
            return Misses(absent, np.zeros(len(absent)), np.full(len(absent), np.inf), 1)
        queries = np.bincount(self._probes[self._probes >= 0], minlength=self._tier.nlist)[absent]
        # The link moves while what has come is scored, so its end is as fast as the slower of both.
        link_s = np.maximum(nbytes / place.link.bytes_per_s, nbytes * queries / place.scoring_moved.bytes_per_s)
        in_place_s = nbytes * queries / place.scoring.bytes_per_s
        return Misses(
            absent, link_s, in_place_s, faiss_threads(), place.latency_s, self._together.slowdown, self._link_share
        )

    def _go_on(self) -> None:
        """Give both ends what they should do next."""
        if self._error is not None:
            return
        place = self._tier.in_place
        if place and not self._scoring_beside and (lists := self._misses.in_place()):
            self._scoring_beside = True
            self._start(self._score_in_place, place, lists)
        most = len(self._misses) if place is None else self._tier.depth - self._coming_now
        if most > 0 and (lists := self._misses.for_link(most)):
            claim = self._tier.claim(lists, self._told)
            if claim.absent:
                self._misses.refused(claim.absent)
            self.fetched.extend(claim.started)
            self._coming_now += len(claim.coming) + len(claim.started)
            self._score(claim.hits)  # other lookahead has brought them

    def _score_in_place(self, place: InPlace, lists: list[int]) -> None:
        """Score from the one end until it has nothing more to do; on the thread beside, if there is something to be beside."""
        try:
            while lists:
                started_s = time.perf_counter()
                keys = self._keys(lists)
                scores, rows = place.score(self._queries, keys, self._k)
                ended_s = time.perf_counter()
                scored = self._tier.list_bytes[keys[keys >= 0]].sum()
                took_s = ended_s - started_s
                # Beside the link it may be slowed, so what it reaches there is the least that it reaches alone.
                if self._misses.ends is not Ends.BOTH or scored > place.scoring.bytes_per_s * took_s:
                    place.scoring.observe(float(scored), took_s)
                self._tracer.add(IN_PLACE, f"score {len(lists)} lists", started_s, ended_s)
                self._events.put(_Scored(_Piece(started_s, ended_s, lists, in_place=True), scores, rows))
                lists = self._misses.in_place() if self._error is None else []
            self._events.put(None)
        except BaseException as error:
            self._events.put(error)

    def _told(self, lists: Sequence[int], error: TeleragError | None) -> None:
        self._events.put(_Arrived(lists, error))

    def _next_events(self) -> list[_Arrived | _Scored | BaseException | None]:
        """At least one, and all that came with it: fewer and larger calls of the scorer."""
        events = [self._events.get()]
        try:
            while True:
                events.append(self._events.get_nowait())
        except Empty:
            return events

    def _take_in(self, events: Sequence[_Arrived | _Scored | BaseException | None]) -> None:
        here: list[int] = []
        for event in events:
            if isinstance(event, _Arrived):
                self._coming_now -= len(event.lists)
                if event.error is None:
                    here.extend(event.lists)
                else:
                    self._fall_back(event.lists, event.error)
            elif isinstance(event, _Scored):
                self.in_place.extend(event.piece.lists)
                self._pieces.append(event.piece)
                self._merge(event.scores, event.rows)
            else:
                self._scoring_beside = False
                self._error = self._error or event
        self._misses.moved(busy=self._coming_now > 0)
        self._score(here)

    def _fall_back(self, lists: Sequence[int], error: TeleragError) -> None:
        if self._tier.in_place is None:
            self._error = self._error or error
        else:
            self.failed.extend(lists)
            self._misses.failed(lists)

    def _keys(self, lists: Sequence[int]) -> IntArray:
        """The lists that each query scores of these, (n, m) with -1 to skip."""
        chosen = np.array(lists, np.int64)
        single = len(self._queries) == 1
        return chosen[None] if single else np.where(np.isin(self._probes, chosen), self._probes, -1)

    def _score(self, lists: Sequence[int]) -> None:
        if not lists:
            return
        started_s = time.perf_counter()
        keys = self._keys(lists)
        failed = False
        try:
            found = self._tier.score(self._queries, keys, self._k)
        except ResourceError as error:
            failed = True
            self._fall_back(lists, error)
        else:
            self._merge(*found)
        finally:
            self._tier.release(lists)
            self._misses.room()
        ended_s = time.perf_counter()
        if not failed:
            self._pieces.append(_Piece(started_s, ended_s, lists, in_place=False))
        if place := self._tier.in_place:
            scored = float(self._tier.list_bytes[keys[keys >= 0]].sum())
            place.scoring_moved.observe(scored, max(ended_s - started_s - place.latency_s, 0.0))
        self.score_s += ended_s - started_s
        self._tracer.add(JOIN, f"score {len(lists)} lists", started_s, ended_s)

    def _merge(self, scores: FloatArray, rows: IntArray) -> None:
        self.scores, self.rows = merge((self.scores, self.rows), (scores, rows), self._k, self._metric)
