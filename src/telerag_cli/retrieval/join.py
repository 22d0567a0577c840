"""The join: the way of queries that have arrived through hits, arrivals and misses, keeping the best so far.

There are two strategies. `DiskJoin` reads what is missing and scores it as it arrives. `TwoEndsJoin` is for a slow tier
that can be scored in place: the link moves misses from one end of their row, and a thread beside scores from the other.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import numpy as np

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.config import Metric
from telerag_cli.errors import ResourceError, TeleragError
from telerag_cli.index.scoring import faiss_threads, merge, nothing
from telerag_cli.retrieval.report import JoinObserver
from telerag_cli.retrieval.split import ContentionEstimate, Ends, Misses
from telerag_cli.tiers.rates import InPlace
from telerag_cli.tiers.tier import FastTier, PinResult

RETRY_S = 0.002


@dataclass(frozen=True)
class Probes:
    """What a join searches: queries (n, dimension), the lists that each probes (n, nprobe), and results for each."""

    queries: FloatArray
    lists: IntArray
    k: int
    metric: Metric


class Join(ABC):
    """What both strategies share: moves, what arrives, and scoring it in fast memory."""

    def __init__(self, tier: FastTier, probes: Probes, observer: JoinObserver) -> None:
        self._tier = tier
        self._probes = probes
        self._observer = observer
        self.scores, self.rows = nothing(len(probes.queries), probes.k, probes.metric)
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._moving = 0
        self._arrived: list[int] = []
        self._error: BaseException | None = None

    @abstractmethod
    def run(self, wanted: Sequence[int]) -> None:
        """Score these distinct lists; `scores` and `rows`, (n, k), then are the result.

        Raises:
            TeleragError: a list could not be read.
        """

    @abstractmethod
    def _unmoved(self, lists: Sequence[int], error: TeleragError) -> None:
        """Deal with lists that could not be moved, or not be scored where they were moved to."""

    def _pin(self, lists: Sequence[int], *, move: bool = True) -> PinResult:
        """Reference lists and start moving what is absent; `_wait` takes in what arrives."""
        pinned = self._tier.pin(lists, self._on_arrival, move=move)
        self._moving += len(pinned.coming) + len(pinned.started)
        return pinned

    def _on_arrival(self, lists: Sequence[int], error: TeleragError | None) -> None:
        self._events.put(partial(self._arrive, lists, error))  # from the link's thread to this one

    def _arrive(self, lists: Sequence[int], error: TeleragError | None) -> None:
        self._moving -= len(lists)
        if error is None:
            self._arrived.extend(lists)
        else:
            self._unmoved(lists, error)

    def _wait(self) -> list[int]:
        """The lists that arrived by the next event and all that came with it: fewer, larger calls of the scorer."""
        self._arrived = []
        self._events.get()()
        while not self._events.empty():
            self._events.get()()
        return self._arrived

    def _keys(self, lists: Sequence[int]) -> IntArray:
        """The lists that each query scores of these, (n, m) with -1 to skip."""
        chosen = np.array(lists, np.int64)
        single = len(self._probes.queries) == 1
        return chosen[None] if single else np.where(np.isin(self._probes.lists, chosen), self._probes.lists, -1)

    def _bytes_of(self, keys: IntArray) -> float:
        """Bytes of these lists, counted for each query."""
        return float(self._tier.list_bytes[keys[keys >= 0]].sum())

    def _score(self, lists: Sequence[int]) -> None:
        """Score lists that are in fast memory, and release them."""
        if not lists:
            return
        started_s = time.perf_counter()
        keys = self._keys(lists)
        try:
            self._merge(*self._tier.score(self._probes.queries, keys, self._probes.k))
        except ResourceError as error:
            self._unmoved(lists, error)
        else:
            ended_s = time.perf_counter()
            self._observer.scored(lists, started_s, ended_s)
            if place := self._tier.in_place:
                place.scoring_moved.observe(self._bytes_of(keys), max(ended_s - started_s - place.latency_s, 0.0))
        finally:
            self._tier.release(lists)

    def _merge(self, scores: FloatArray, rows: IntArray) -> None:
        self.scores, self.rows = merge((self.scores, self.rows), (scores, rows), self._probes.k, self._probes.metric)


class DiskJoin(Join):
    """Reads what is missing, as far as there is room for it, and scores it as it arrives."""

    def run(self, wanted: Sequence[int]) -> None:
        """See `Join`."""
        pinned = self._pin(wanted)
        self._observer.pinned(pinned)
        self._score(pinned.hits)
        refused = pinned.absent
        while self._moving or (refused and self._error is None):
            if self._moving:
                self._score(self._wait())
            else:
                time.sleep(RETRY_S)  # moves of other lookahead stand in the way; they end by themselves
            if refused and self._error is None:
                pinned = self._pin(refused)
                self._observer.fetched(pinned.started)
                self._score(pinned.hits)  # other lookahead has brought them
                refused = pinned.absent
        if self._error is not None:
            raise self._error

    def _unmoved(self, lists: Sequence[int], error: TeleragError) -> None:
        self._error = self._error or error


class TwoEndsJoin(Join):
    """Moves misses from one end of their row and scores them in place from the other, until both ends meet.

    What cannot be moved, or not be scored where it was moved to, is scored in place too.
    """

    def __init__(
        self,
        tier: FastTier,
        probes: Probes,
        observer: JoinObserver,
        place: InPlace,
        beside: Executor,
        contention: ContentionEstimate,
    ) -> None:
        """Score in the slow tier by ``place``, on the thread ``beside``; ``contention`` learns from it."""
        super().__init__(tier, probes, observer)
        self._place = place
        self._beside = beside
        self._contention = contention
        self._misses: Misses
        self._scoring_in_place = False

    def run(self, wanted: Sequence[int]) -> None:
        """See `Join`."""
        pinned = self._pin(wanted, move=False)
        self._observer.pinned(pinned)
        self._misses = self._row_of(pinned.absent)
        # With nothing to do beside it, scoring in place needs no thread of its own, nor Faiss others than it has just
        # used.
        alone = self._misses.ends is Ends.IN_PLACE and not (pinned.hits or self._moving)
        started_s = time.perf_counter()
        self._feed(alone=alone)
        self._score(pinned.hits)
        while self._moving or self._scoring_in_place or (len(self._misses) and self._error is None):
            if self._moving or self._scoring_in_place:
                arrived = self._wait()
                self._misses.moved(busy=self._moving > 0)
                self._score(arrived)
            else:
                time.sleep(RETRY_S)  # moves of other lookahead stand in the way; they end by themselves
                self._misses.room()
            self._feed(alone=alone)
        if self._error is not None:
            raise self._error
        # There was little else to do, and nothing went wrong: the time tells whether two ends are better than one.
        if len(pinned.absent) > len(pinned.hits) + len(pinned.coming) and not self._observer.failed:
            if self._misses.ends is Ends.BOTH:
                self._contention.observe(self._misses.expected_s, time.perf_counter() - started_s)
            else:
                self._contention.fade()

    def _unmoved(self, lists: Sequence[int], error: TeleragError) -> None:
        self._observer.failed.extend(lists)
        self._misses.failed(lists)

    def _score(self, lists: Sequence[int]) -> None:
        super()._score(lists)
        if lists:
            self._misses.room()

    def _row_of(self, absent: Sequence[int]) -> Misses:
        place, probes = self._place, self._probes.lists
        nbytes = self._tier.list_bytes[absent].astype(np.float64)
        queries = np.bincount(probes[probes >= 0], minlength=self._tier.nlist)[absent]
        # The link moves while what has come is scored, so its end is as fast as the slower of both.
        link_s = np.maximum(nbytes / place.link.bytes_per_s, nbytes * queries / place.scoring_moved.bytes_per_s)
        in_place_s = nbytes * queries / place.scoring.bytes_per_s
        return Misses(absent, link_s, in_place_s, faiss_threads(), place.latency_s, self._contention.slowdown)

    def _feed(self, *, alone: bool) -> None:
        """Give both ends what they should do next."""
        if self._error is not None:
            return
        if not self._scoring_in_place and (lists := self._misses.in_place()):
            self._scoring_in_place = True
            if alone:
                self._score_in_place(lists)
            else:
                self._beside.submit(self._score_in_place, lists)
        free = self._tier.depth - self._moving
        if free > 0 and (lists := self._misses.for_link(free)):
            pinned = self._pin(lists)
            self._observer.fetched(pinned.started)
            if pinned.absent:
                self._misses.refused(pinned.absent)
            self._score(pinned.hits)  # other lookahead has brought them

    def _score_in_place(self, lists: list[int]) -> None:
        """Score from the one end until it has nothing more to do."""
        try:
            while lists:
                started_s = time.perf_counter()
                keys = self._keys(lists)
                scores, rows = self._place.score(self._probes.queries, keys, self._probes.k)
                ended_s = time.perf_counter()
                scored_bytes, took_s = self._bytes_of(keys), ended_s - started_s
                # Beside the link it may be slowed, so what it reaches there is the least that it reaches alone.
                if self._misses.ends is not Ends.BOTH or scored_bytes > self._place.scoring.bytes_per_s * took_s:
                    self._place.scoring.observe(scored_bytes, took_s)
                self._events.put(partial(self._take_in_place, lists, started_s, ended_s, scores, rows))
                lists = self._misses.in_place() if self._error is None else []
            self._events.put(self._stop_in_place)
        except BaseException as error:
            self._events.put(partial(self._stop_in_place, error))

    def _take_in_place(
        self, lists: Sequence[int], started_s: float, ended_s: float, scores: FloatArray, rows: IntArray
    ) -> None:
        self._observer.scored(lists, started_s, ended_s, in_place=True)
        self._merge(scores, rows)

    def _stop_in_place(self, error: BaseException | None = None) -> None:
        self._scoring_in_place = False
        self._error = self._error or error
