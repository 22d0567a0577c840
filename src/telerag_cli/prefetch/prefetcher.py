"""Prefetches: keep the link busy with the best next lists until the query arrives."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from telerag_cli.arrays import BoolArray, DoubleArray, FloatArray, IntArray
from telerag_cli.errors import TeleragError
from telerag_cli.prefetch.queue import PrefetchQueue
from telerag_cli.tiers.residency import Protected
from telerag_cli.tiers.tier import FastTier


@dataclass(frozen=True)
class Window:
    """The time in which a prefetch could move lists, and how it used it."""

    window_s: float
    """From its first order to its end."""
    moving_s: float
    """Of that, with moves under way."""
    bytes_moved: int
    """Bytes that arrived in it."""
    held_share: float
    """Share of the bytes that the first order would have probed that was in fast memory at the beginning."""
    prefetches: int
    """Prefetches under way at the beginning, this one included."""


@dataclass(frozen=True)
class FollowedOrder:
    """An order that a prefetch followed."""

    at_s: float
    """Since when, in ``time.perf_counter`` seconds."""
    fraction: float
    """Share of the expected text that it was made from; 0 for the question alone."""


class Prefetcher:
    """Keeps ``tier.depth`` moves under way for all prefetches together, taking from each in turn its best lists.

    A move's end starts the next one, in the link's own thread: nothing polls, and stopping is one flag. The depth is
    the link's and not each prefetch's, so that what a query waits for has at most that many moves before it. On a deep
    link several moves are started at a time: there, what is done once for each start would take longer than the moves.
    """

    def __init__(self, tier: FastTier) -> None:
        self.tier = tier
        self.lock = threading.Lock()
        self._active: deque[Prefetch] = deque()
        self._under_way = 0
        self._least = max(1, tier.depth // 4)

    def start(
        self, orders: Sequence[IntArray], depth: int, nprobe: int, kept: BoolArray, budget_bytes: int | None = None
    ) -> list[Prefetch]:
        """Start a prefetch for each of these orders; each holds its place until `Prefetch.end`.

        Orders are distinct lists, best first, and the first ``depth`` of each are worth moving. The cache keeps
        ``kept`` meanwhile, shape (nlist,). Each may move ``budget_bytes``; without it, as much as there is time for.
        """
        list_bytes, here = self.tier.list_bytes, ~self.tier.absent()
        with self.lock:
            beside = sum(each.going for each in self._active) + len(orders)
            started = []
            for order in orders:
                likely = order[:nprobe]
                held_share = int(list_bytes[likely[here[likely]]].sum()) / max(int(list_bytes[likely].sum()), 1)
                new = Prefetch(self, PrefetchQueue(list_bytes, kept, budget_bytes), held_share, beside)
                new.reorder(order, depth, 0.0)
                started.append(new)
            self._active.extend(started)
        self.fill()
        return started

    @property
    def count(self) -> int:
        """How many prefetches have not ended."""
        with self.lock:
            return len(self._active)

    def remove(self, ended: Prefetch) -> None:
        """Forget a prefetch; its lists may be evicted for others from now on."""
        with self.lock:
            if ended in self._active:
                self._active.remove(ended)

    def fill(self) -> None:
        """Start moves until the link is as deep as it should be, or there is nothing to move."""
        while True:
            with self.lock:
                room = self.tier.depth - self._under_way
                chosen = self._choose(room) if room >= self._least else None
                if chosen is None:
                    return
                taker, lists, protected = chosen
                self._under_way += len(lists)
                taker.count_moves(len(lists))
                priority = taker.queue.priority
            started, full = self.tier.prefetch(lists, protected, priority, partial(self._arrived, taker))
            with self.lock:
                self._under_way -= len(lists) - len(started)
                taker.count_moves(len(started) - len(lists))
                if full:
                    # What ranks lower may evict even less: only a new order can go on.
                    taker.queue.end()

    def _choose(self, room: int) -> tuple[Prefetch, list[int], Protected] | None:
        """The next prefetch in turn with lists to move, its share of the room in lists, and what they may not evict."""
        absent = self.tier.absent()
        share = max(1, room // max(1, sum(each.going for each in self._active)))
        for _ in range(len(self._active)):
            taker = self._active[0]
            self._active.rotate(-1)
            if taker.going and (lists := taker.queue.take(absent, share)):
                # What others are moving for queries to come is worth as much as what this one moves.
                others = [other.queue.wanted for other in self._active if other is not taker]
                return taker, lists, partial(_protected, taker.queue.protected(), others)
        return None

    def _arrived(self, taker: Prefetch, lists: Sequence[int], error: TeleragError | None) -> None:
        with self.lock:
            self._under_way -= len(lists)
            taker.count_moves(-len(lists))
            if error is None:
                taker.moved.extend(lists)
                taker.arrived_s.extend([time.perf_counter()] * len(lists))
            else:
                taker.failed += len(lists)
        self.fill()


def _protected(own: Protected, others: Sequence[BoolArray], list_no: int) -> BoolArray:
    mask: BoolArray = np.logical_or.reduce([own(list_no), *others])
    return mask


class Prefetch:
    """Lookahead for what one question will search next; made by `Prefetcher.start`."""

    def __init__(self, prefetcher: Prefetcher, queue: PrefetchQueue, held_share: float, beside: int) -> None:
        """Begin with nothing to move; see `Window` for the share and for how many there are."""
        self._prefetcher = prefetcher
        self.queue = queue
        self.going = True
        self.under_way = 0
        self.moved: list[int] = []
        """Lists moved, in order of arrival."""
        self.arrived_s: list[float] = []
        """When each of them arrived, in ``time.perf_counter`` seconds."""
        self.failed = 0
        """Moves that ended in an error; the join tries those lists again and reports it."""
        self.question: FloatArray | None = None
        """Embedding of what it was started for, shape (dimension,), where texts may refine it."""
        self.orders: list[FollowedOrder] = []
        """Orders followed: the first, and one for each refinement."""
        self.window = Window(0.0, 0.0, 0, held_share, beside)
        """Complete when it has stopped."""
        self._began_s = time.perf_counter()
        self._moving_since_s = 0.0
        self._moving_s = 0.0

    def follow(self, order: IntArray, depth: int, fraction: float = 0.0) -> None:
        """Move the ``depth`` best lists of an order (distinct, best first) from now on; what is under way goes on.

        ``fraction`` is the share of the expected text that the order was made from.
        """
        with self._prefetcher.lock:
            if not self.going:
                return
            self.reorder(order, depth, fraction)
        self._prefetcher.fill()

    def reorder(self, order: IntArray, depth: int, fraction: float) -> None:
        """As `follow`, without starting a move; the prefetcher's lock is held."""
        self.orders.append(FollowedOrder(time.perf_counter(), fraction))
        self.queue.reorder(order, depth)

    def count_moves(self, count: int) -> None:
        """So many more are under way, or fewer; the prefetcher's lock is held."""
        before, self.under_way = self.under_way, self.under_way + count
        if not self.going:
            return
        if not before and self.under_way:
            self._moving_since_s = time.perf_counter()
        elif before and not self.under_way:
            self._moving_s += time.perf_counter() - self._moving_since_s

    def stop(self) -> None:
        """Start no more moves. Those under way end by themselves and are waited for only if needed."""
        with self._prefetcher.lock:
            if not self.going:
                return
            self.going = False
            now_s = time.perf_counter()
            moving_s = self._moving_s + (now_s - self._moving_since_s if self.under_way else 0.0)
            window_s = now_s - self._began_s
            self.window = replace(self.window, window_s=window_s, moving_s=moving_s, bytes_moved=self.bytes_moved)

    def end(self) -> None:
        """Stop, and let others evict what was moved."""
        self.stop()
        self._prefetcher.remove(self)

    @property
    def idle(self) -> bool:
        """Whether the order has been followed to its end."""
        with self._prefetcher.lock:
            return self.queue.ended and not self.under_way

    @property
    def bytes_moved(self) -> int:
        """Bytes of the lists moved so far."""
        return int(self._prefetcher.tier.list_bytes[self.moved].sum()) if self.moved else 0

    def arrivals(self) -> tuple[IntArray, DoubleArray]:
        """The lists moved so far, and when each arrived in ``time.perf_counter`` seconds, both of shape (n,)."""
        with self._prefetcher.lock:
            return np.array(self.moved, np.int64), np.array(self.arrived_s, np.float64)
