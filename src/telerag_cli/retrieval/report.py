"""What a join found and did: counts for output lines, and times for whoever draws it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np

from telerag_cli.arrays import BoolArray, DoubleArray, IntArray
from telerag_cli.prefetch.prefetcher import FollowedOrder, Prefetch, Window
from telerag_cli.tiers.tier import PinResult
from telerag_cli.tracing import Tracer

JOIN = "join"
IN_PLACE = "in place"


@dataclass(frozen=True, eq=False)
class JoinTrace:
    """When what happened in one retrieval, for whoever draws it.

    Times are ``time.perf_counter`` seconds of the process that searched. It is about this search alone, whatever was
    searched together with it; only the times of scoring are those of all.
    """

    arrived_s: float
    """When the query arrived."""
    ended_s: float
    """When its results were there."""
    orders: tuple[FollowedOrder, ...]
    """Those that its lookahead followed."""
    wanted: IntArray
    """The distinct lists probed, without empty ones, shape (lists_wanted,)."""
    moved: IntArray
    """Lists that its lookahead moved, in order of arrival for each of its prefetches, shape (lists_moved,)."""
    moved_s: DoubleArray
    """When each of them arrived."""
    fetched: IntArray
    """Missed lists that the join began to move; others were scored in place or came with other lookahead after all."""
    scored_s: DoubleArray
    """Begin and end of each call of a scorer that scored a list of this search, shape (n, 2)."""
    scored: IntArray
    """How many of its lists each call scored, shape (n,)."""
    scored_in_place: BoolArray
    """Which calls scored in the slow tier, shape (n,)."""
    again_s: float
    """Seconds before the end in which candidates were re-ranked."""


@dataclass(frozen=True)
class JoinReport:
    """What one retrieval found in fast memory, what it read, and how long it took."""

    lists_wanted: int
    """Distinct lists probed, without empty ones."""
    lists_hit: int
    """Of those, in fast memory when the query arrived."""
    lists_coming: int
    """Of those, on their way when the query arrived."""
    lists_missed: int
    """Of those, neither: moved because the query needed them, or scored where they lie."""
    lists_moved: int
    """Lists that lookahead moved for this retrieval."""
    lists_wasted: int
    """Of those, not probed."""
    bytes_wanted: int
    bytes_moved: int
    bytes_missed: int
    lists_in_place: int
    """Of those missed, scored where they lie in the slow tier."""
    lists_failed: int
    """Times that a list could not be moved to fast memory, by lookahead or at the join, or not be scored there."""
    orders: int
    """Orders that lookahead followed: the first, and one for each refinement."""
    coarse_s: float
    score_s: float
    join_s: float
    """From the query's arrival to its results, all included."""
    window: Window | None = None
    """Of the lookahead that prepared it, if any did."""
    trace: JoinTrace | None = field(default=None, compare=False, repr=False)
    """How it went, where there is a fast tier."""

    @classmethod
    def count_names(cls) -> list[str]:
        """Names of the lists and bytes counted."""
        return [entry.name for entry in fields(cls) if entry.name.startswith(("lists_", "bytes_", "orders"))]

    @staticmethod
    def failures(count: int) -> str:
        """What a user should know of so many of `lists_failed`."""
        return (
            f"{count:,} times a list could not be brought to fast memory or scored there; "
            "that cost time and changed no result."
        )

    def counts(self) -> dict[str, int]:
        """The lists and bytes, for a run's output line."""
        return {name: getattr(self, name) for name in self.count_names()}


class _Scored(NamedTuple):
    """A call of a scorer."""

    started_s: float
    ended_s: float
    lists: Sequence[int]
    in_place: bool


class JoinObserver:
    """Notes what happens in a join, whose searches may be several, and writes the report of each. For one thread."""

    def __init__(self, list_bytes: IntArray, tracer: Tracer) -> None:
        self._arrived_s = self._probed_s = self._ended_s = time.perf_counter()
        self._joined_s: float | None = None
        self.failed: list[int] = []
        """Lists that could not be moved, or not be scored where they were moved to."""
        self._list_bytes = list_bytes
        self._tracer = tracer
        self._coming: list[int] = []
        self._missed: list[int] = []
        self._fetched: list[int] = []
        self._scored: list[_Scored] = []
        self._score_s = 0.0

    def probed(self) -> None:
        """It is known which lists the queries probe."""
        self._probed_s = time.perf_counter()

    def pinned(self, lists: PinResult) -> None:
        """This is where the lists were when the query arrived."""
        # What found no room is missed too, however it gets here later: other lookahead may bring it.
        self._coming, self._missed = lists.coming, lists.started + lists.absent
        self.fetched(lists.started)

    def fetched(self, lists: Sequence[int]) -> None:
        """The join began to move these."""
        self._fetched.extend(lists)

    def scored(self, lists: Sequence[int], started_s: float, ended_s: float, *, in_place: bool = False) -> None:
        """These were scored in one call."""
        self._scored.append(_Scored(started_s, ended_s, lists, in_place))
        self._score_s += 0.0 if in_place else ended_s - started_s
        self._tracer.add(IN_PLACE if in_place else JOIN, f"score {len(lists)} lists", started_s, ended_s)

    def joined(self) -> None:
        """All lists were scored, and re-ranking begins."""
        self._joined_s = time.perf_counter()

    def ended(self) -> None:
        """The results are there."""
        self._ended_s = time.perf_counter()

    def report(self, prefetches: Sequence[Prefetch], wanted: IntArray) -> JoinReport:
        """What the join was for a search of these lists; what two searches needed counts for both."""
        arrivals = [prefetch.arrivals() for prefetch in prefetches]
        moved = np.concatenate([np.empty(0, np.int64), *(lists for lists, _arrived_s in arrivals)])
        moved_s = np.concatenate([np.empty(0), *(arrived_s for _lists, arrived_s in arrivals)])
        orders = tuple(order for prefetch in prefetches for order in prefetch.orders)
        missed, failed, coming, fetched = (
            wanted[self._mask(lists)[wanted]] for lists in (self._missed, self.failed, self._coming, self._fetched)
        )
        calls, counts = self._calls_for(wanted)
        trace = JoinTrace(
            self._arrived_s,
            self._ended_s,
            orders,
            wanted,
            moved,
            moved_s,
            fetched,
            scored_s=np.array([(call.started_s, call.ended_s) for call in calls], np.float64).reshape(-1, 2),
            scored=counts,
            scored_in_place=np.array([call.in_place for call in calls], np.bool_),
            again_s=0.0 if self._joined_s is None else self._ended_s - self._joined_s,
        )
        in_place = [list_no for call in self._scored if call.in_place for list_no in call.lists]
        report = JoinReport(
            lists_wanted=len(wanted),
            lists_hit=len(wanted) - len(missed) - len(coming),
            lists_coming=len(coming),
            lists_missed=len(missed),
            lists_moved=len(moved),
            lists_wasted=len(moved) - int(self._mask(wanted)[moved].sum()),
            bytes_wanted=int(self._list_bytes[wanted].sum()),
            bytes_moved=int(self._list_bytes[moved].sum()),
            bytes_missed=int(self._list_bytes[missed].sum()),
            lists_in_place=int(self._mask(in_place)[missed].sum()),
            lists_failed=len(failed) + sum(prefetch.failed for prefetch in prefetches),
            orders=len(orders),
            coarse_s=self._probed_s - self._arrived_s,
            score_s=self._score_s,
            join_s=self._ended_s - self._arrived_s,
            window=prefetches[0].window if prefetches else None,
            trace=trace,
        )
        if self._tracer.wanted:
            self._tracer.add(JOIN, "join", self._arrived_s, self._ended_s, **report.counts())
        return report

    def _calls_for(self, wanted: IntArray) -> tuple[list[_Scored], IntArray]:
        """The calls of scorers that scored any of these lists, and how many of these each scored."""
        counts = np.bincount(self._call_of[wanted] + 1, minlength=len(self._scored) + 1)[1:]
        there = np.flatnonzero(counts)
        return [self._scored[number] for number in there.tolist()], counts[there]

    @cached_property
    def _call_of(self) -> IntArray:
        """Which call scored each list, shape (nlist,); -1 for none."""
        numbers: IntArray = np.full(len(self._list_bytes), -1, np.int64)
        for number, call in enumerate(self._scored):
            numbers[np.asarray(call.lists, np.int64)] = number
        return numbers

    def _mask(self, lists: Sequence[int] | IntArray) -> BoolArray:
        mask: BoolArray = np.zeros(len(self._list_bytes), np.bool_)
        mask[np.asarray(lists, np.int64)] = True
        return mask
