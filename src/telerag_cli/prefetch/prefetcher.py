"""Rounds of lookahead: keep the link busy with the best next list until the query arrives."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from telerag_cli.arrays import BoolArray, DoubleArray, IntArray
from telerag_cli.errors import TeleragError
from telerag_cli.prefetch.queue import PrefetchQueue
from telerag_cli.tiers.base import FastTier, Stay


@dataclass(frozen=True)
class Window:
    """The time in which a round could move lists, and how it used it."""

    window_s: float
    """From the round's first order to its end."""
    moving_s: float
    """Of that, with moves under way."""
    bytes_moved: int
    """That arrived in it."""
    held_share: float
    """Of the bytes that the first order would have probed, in fast memory at the beginning."""
    rounds: int
    """Rounds of lookahead under way at the beginning, this one included."""


@dataclass(frozen=True)
class Order:
    """An order that a round followed."""

    at_s: float
    """Since when, in ``time.perf_counter`` seconds."""
    fraction: float
    """Share of the expected text that it was made from; 0 for the question alone."""


class Prefetcher:
    """Keeps ``tier.depth`` moves under way for all rounds together, taking from each in turn its best lists.

    A move's end starts the next one, in the link's own thread: nothing polls, and stopping is one flag. The depth is
    the link's and not each round's, so that what a query waits for has at most that many moves before it. On a deep
    link several moves are started at a time: there, what is done once for each start would take longer than the moves.
    """

    def __init__(self, tier: FastTier) -> None:
        self.tier = tier
        self.lock = threading.Lock()
        self._rounds: deque[Prefetch] = deque()
        self._under_way = 0
        self._least = max(1, tier.depth // 4)

    def start(self, plan: PrefetchQueue) -> Prefetch:
        """A new round, which moves nothing until it follows an order and holds a place until `Round.end`."""
        new = Prefetch(self, plan)
        with self.lock:
            self._rounds.append(new)
        return new

    def begin(self, orders: Sequence[tuple[Prefetch, IntArray]], prefetch_depth: int, nprobe: int) -> None:
        """Follow the ``prefetch_depth`` best lists of each round's first order, for queries that will probe ``nprobe`` lists."""
        for new, order in orders:
            new.begin(order, prefetch_depth, nprobe)
        self.fill()

    @property
    def all(self) -> Sequence[Prefetch]:
        """Rounds that have not ended; the lock is held."""
        return self._rounds

    @property
    def rounds(self) -> int:
        """How many have not ended."""
        with self.lock:
            return len(self._rounds)

    def remove(self, ended: Prefetch) -> None:
        """Forget a round; its lists may be evicted for others from now on."""
        with self.lock:
            if ended in self._rounds:
                self._rounds.remove(ended)

    def fill(self) -> None:
        """Start moves until the link is as deep as it should be, or no round has anything to move."""
        while True:
            with self.lock:
                room = self.tier.depth - self._under_way
                chosen = self._choose(room) if room >= self._least else None
                if chosen is None:
                    return
                taker, lists, protected = chosen
                self._under_way += len(lists)
                taker.move(len(lists))
                priority = taker.plan.priority
            outcome = self.tier.prefetch(lists, protected, priority, partial(self._arrived, taker))
            with self.lock:
                self._under_way -= len(lists) - len(outcome.started)
                taker.move(len(outcome.started) - len(lists))
                if outcome.full:
                    # What ranks lower may evict even less: only a new order can go on.
                    taker.plan.end()

    def _choose(self, room: int) -> tuple[Prefetch, list[int], Stay] | None:
        """The next round in turn that has lists to move, its share of the room in lists, and what may not be evicted for them."""
        absent = self.tier.absent()
        share = max(1, room // max(1, sum(each.going for each in self._rounds)))
        for _ in range(len(self._rounds)):
            taker = self._rounds[0]
            self._rounds.rotate(-1)
            if taker.going and (lists := taker.plan.take(absent, share)):
                # What others are moving for queries to come is worth as much as what this one moves.
                others = [other.plan.wanted for other in self._rounds if other is not taker]
                return taker, lists, partial(_stay, taker.plan.protected(), others)
        return None

    def _arrived(self, taker: Prefetch, lists: Sequence[int], error: TeleragError | None) -> None:
        with self.lock:
            self._under_way -= len(lists)
            taker.move(-len(lists))
            if error is None:
                taker.moved.extend(lists)
                taker.arrived_s.extend([time.perf_counter()] * len(lists))
            else:
                taker.failed += len(lists)
        self.fill()


def _stay(own: Stay, others: Sequence[BoolArray], list_no: int) -> BoolArray:
    mask: BoolArray = np.logical_or.reduce([own(list_no), *others])
    return mask


class Prefetch:
    """Lookahead for what one question will search next; made by `Mover.start`."""

    def __init__(self, mover: Prefetcher, plan: PrefetchQueue) -> None:
        self._mover = mover
        self.plan = plan
        self.going = True
        self.under_way = 0
        self.moved: list[int] = []
        """Lists moved in this round, in order of arrival."""
        self.arrived_s: list[float] = []
        """When each of them did, in ``time.perf_counter`` seconds."""
        self.failed = 0
        """Moves that ended in an error; the join tries those lists again and tells."""
        self.followed: list[Order] = []
        """Orders, since they were: one, and one more for each refinement."""
        self.window = Window(0.0, 0.0, 0, 0.0, 1)
        """Known when it has stopped."""
        self._began_s: float | None = None
        self._moving_since_s = 0.0
        self._moving_s = 0.0
        self._held_share = 0.0
        self._rounds = 1

    def follow(self, order: IntArray, prefetch_depth: int, fraction: float = 0.0) -> None:
        """Move the ``prefetch_depth`` best lists of this order from now on; what is under way goes on.

        Args:
            order: distinct lists, best first.
            prefetch_depth: how many of them are worth moving.
            fraction: share of the expected text that the order was made from.
        """
        with self._mover.lock:
            if not self.going:
                return
            self.followed.append(Order(time.perf_counter(), fraction))
            self.plan.reorder(order, prefetch_depth)
        self._mover.fill()

    def begin(self, order: IntArray, prefetch_depth: int, nprobe: int) -> None:
        """Take the first order, for a query that will probe ``nprobe`` lists; the window begins, and nothing moves yet."""
        tier = self._mover.tier
        likely = order[:nprobe]
        likely_bytes = tier.list_bytes[likely]
        held_bytes = int(likely_bytes[~tier.absent()[likely]].sum())
        with self._mover.lock:
            self._held_share = held_bytes / max(int(likely_bytes.sum()), 1)
            self._rounds = sum(each.going for each in self._mover.all)
            self._began_s = time.perf_counter()
            self.followed.append(Order(self._began_s, 0.0))
            self.plan.reorder(order, prefetch_depth)

    def move(self, count: int) -> None:
        """So many more are under way, or fewer; the mover's lock is held."""
        before, self.under_way = self.under_way, self.under_way + count
        if not self.going:
            return
        if not before and self.under_way:
            self._moving_since_s = time.perf_counter()
        elif before and not self.under_way:
            self._moving_s += time.perf_counter() - self._moving_since_s

    def stop(self) -> None:
        """Start no more moves. Those under way end by themselves and are waited for only if needed."""
        with self._mover.lock:
            if not self.going:
                return
            now_s = time.perf_counter()
            moving_s = self._moving_s + (now_s - self._moving_since_s if self.under_way else 0.0)
            window_s = now_s - (now_s if self._began_s is None else self._began_s)
            self.window = Window(window_s, moving_s, self.bytes_moved, self._held_share, self._rounds)
            self.going = False

    def end(self) -> None:
        """Stop, and let others evict what this round has moved."""
        self.stop()
        self._mover.remove(self)

    @property
    def orders(self) -> int:
        """How many orders were followed."""
        return len(self.followed)

    @property
    def idle(self) -> bool:
        """Whether the order has been followed to its end."""
        with self._mover.lock:
            return self.plan.ended and not self.under_way

    @property
    def bytes_moved(self) -> int:
        """Bytes of the lists moved so far."""
        return int(self._mover.tier.list_bytes[self.moved].sum()) if self.moved else 0

    def arrivals(self) -> tuple[IntArray, DoubleArray]:
        """The lists moved so far, and when each arrived in ``time.perf_counter`` seconds, both of shape (n,)."""
        with self._mover.lock:
            return np.array(self.moved, np.int64), np.array(self.arrived_s, np.float64)
