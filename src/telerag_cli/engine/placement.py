"""Which free replica takes which waiting micro-batch: policies over the same matrix, so that they can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from telerag_cli.arrays import BoolArray, DoubleArray, IntArray
from telerag_cli.config import PlacementName
from telerag_cli.errors import needs_extra

Pairs = list[tuple[int, int]]
"""Places of a replica and of a micro-batch; neither comes twice."""


@dataclass(frozen=True, eq=False)
class Offer:
    """What a placement chooses from: some replicas, and the micro-batches that have waited longest, oldest first."""

    to_move: DoubleArray
    """Bytes that each replica would have to move for each micro-batch, shape (replicas, batches)."""
    load: DoubleArray
    """Bytes still to come to each replica for what it was given, when it last said what it has, shape (replicas,)."""
    free: BoolArray
    """Which replicas can take one, shape (replicas,)."""
    due: int
    """Micro-batches, from the first, that have waited too long: they go before all others."""

    @property
    def cost(self) -> DoubleArray:
        """Bytes to move and on their way: where replicas cannot all get the same, the least loaded ones get more."""
        cost: DoubleArray = self.to_move + self.load[:, None]
        return cost


class Placement(Protocol):
    """Chooses pairs of a free replica and a micro-batch."""

    def choose(self, offer: Offer) -> Pairs:
        """At most one micro-batch for each free replica, and one for at least one of them; those due first."""


class RoundRobin:
    """Micro-batches in order of arrival, replicas in turn: what any cache is compared with."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, offer: Offer) -> Pairs:
        """See `Placement`."""
        replicas = len(offer.free)
        turn = [(self._next + step) % replicas for step in range(replicas)]
        free = [replica for replica in turn if offer.free[replica]]
        pairs = list(zip(free, range(offer.to_move.shape[1]), strict=False))
        self._next = (pairs[-1][0] + 1) % replicas
        return pairs


class Greedy:
    """In order of arrival, each to the free replica with most of its lists (TeleRAG, arXiv 2502.20969)."""

    def choose(self, offer: Offer) -> Pairs:
        """See `Placement`; of equals, the least loaded replica and then the lower number takes it."""
        free = np.flatnonzero(offer.free).tolist()
        pairs = []
        for batch in range(min(offer.to_move.shape[1], len(free))):
            replica = min(free, key=lambda each: (offer.to_move[each, batch], offer.load[each], each))
            free.remove(replica)
            pairs.append((replica, batch))
        return pairs


class CacheAware:
    """Shares what waits among all replicas, so that the fewest bytes move; a free one takes the oldest of its share.

    Each replica has an equal share, and that of a busy one is left for it: what it has the lists of is not given away
    only because another is free now. What it takes of its share is the oldest and not what shares most with its arena,
    because micro-batches come in an order in which neighbours share lists (`telerag_cli.engine.grouping.similar`).
    What both gain is in docs/scheduling.md. With one replica this is the order of arrival.
    """

    def choose(self, offer: Offer) -> Pairs:
        """See `Placement`."""
        pairs = [] if offer.due else self._of_their_shares(offer)
        # Without any, some have waited too long, or only replicas that are busy have a share.
        return pairs or self._now(offer)

    def _of_their_shares(self, offer: Offer) -> Pairs:
        """What each free replica takes of its share, if it has one."""
        replicas, batches = offer.to_move.shape
        owners = np.repeat(np.arange(replicas), -(-batches // replicas))
        rows, columns = _assignment(offer.cost[owners])
        owner = np.empty(batches, np.int64)
        owner[columns] = owners[rows]
        shares = [(replica, np.flatnonzero(owner == replica)) for replica in np.flatnonzero(offer.free).tolist()]
        return [(replica, int(share[0])) for replica, share in shares if len(share)]

    def _now(self, offer: Offer) -> Pairs:
        """The assignment of micro-batches to free replicas that moves the fewest bytes now."""
        free = np.flatnonzero(offer.free)
        cost = offer.cost[free]
        # Those due are in the solution because no sum of others is as low.
        cost[:, : offer.due] -= 1.0 + 2 * len(free) * float(cost.max(initial=0.0))
        rows, columns = _assignment(cost)
        return [(int(free[row]), int(column)) for row, column in zip(rows, columns, strict=True)]


def _assignment(cost: DoubleArray) -> tuple[IntArray, IntArray]:
    """Rows and columns of the pairs with the least sum, as many as there can be."""
    with needs_extra("ray", "Placement by what caches hold"):
        from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost)
    return rows, columns


def make_placement(name: PlacementName) -> Placement:
    """A fresh placement."""
    match name:
        case PlacementName.CACHE_AWARE:
            return CacheAware()
        case PlacementName.GREEDY:
            return Greedy()
        case PlacementName.ROUND_ROBIN:
            return RoundRobin()
