"""What one prefetch moves next, and what may not make room for it. Pure integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from telerag_cli.arrays import BoolArray, DoubleArray, IntArray


class PrefetchQueue:
    """Hands out lists from best to worst; a new order starts again from its best.

    The budget is elastic: there is no number of bytes to move unless the user gives one, only an order, followed until
    the query arrives. Two things bound it. A list may evict only what the order ranks behind it and the cache does not
    keep, so a full arena ends it. And each order says how far down it is worth following.
    """

    def __init__(self, list_bytes: IntArray, kept: BoolArray, budget_bytes: int | None = None) -> None:
        """Begin with nothing to move; see `Prefetcher.start`. All orders together hand out ``budget_bytes``."""
        self._kept = kept
        self._list_bytes = list_bytes
        self._nlist = nlist = len(list_bytes)
        self._left_bytes = budget_bytes
        self._order: IntArray = np.empty(0, np.int64)
        self._rank: IntArray = np.full(nlist, nlist, np.int64)
        self.priority: DoubleArray = np.zeros(nlist)
        """What a list's rank adds to its heat when choosing what to evict: 1 for the best, 0 for the last."""
        self.wanted: BoolArray = np.zeros(nlist, np.bool_)
        """The lists that are worth moving, whether they have been moved or not."""
        self._next = 0

    def reorder(self, order: IntArray, depth: int) -> None:
        """Follow the ``depth`` best of ``order`` (distinct lists, best first) from now on; all of it ranks."""
        self._order = order[:depth]
        self._rank = np.full(self._nlist, self._nlist, np.int64)
        self._rank[order] = np.arange(len(order))
        self.priority = 1.0 - self._rank / self._nlist
        self.wanted = self._rank < depth
        self._next = 0

    def take(self, absent: BoolArray, count: int) -> list[int]:
        """The best absent lists not handed out in this order, at most ``count`` (1 at least); none at the end."""
        rest = self._order[self._next :]
        places = np.flatnonzero(absent[rest])[:count]
        if self._left_bytes is not None:
            ends = np.cumsum(self._list_bytes[rest[places]])
            places = places[ends <= self._left_bytes]
            self._left_bytes -= int(ends[len(places) - 1]) if len(places) else 0
        if not len(places):
            self.end()
            return []
        self._next += int(places[-1]) + 1
        taken: list[int] = rest[places].tolist()
        return taken

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to hand out of this order."""
        return self._next >= len(self._order)

    def end(self) -> None:
        """Hand out nothing more of this order."""
        self._next = len(self._order)

    def protected(self) -> Callable[[int], BoolArray]:
        """Says which lists may not be evicted for one: those ranked before it and those kept, shape (nlist,)."""
        rank, kept = self._rank, self._kept
        return lambda list_no: (rank < rank[list_no]) | kept
