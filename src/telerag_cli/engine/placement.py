"""Which free replica takes which waiting micro-batch: policies over the same matrix, so that they can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from telerag_cli.arrays import BoolArray, DoubleArray, IntArray
from telerag_cli.config import PlacementName
from telerag_cli.errors import needs_extra

__all__ = ["CacheAware", "Greedy", "Offer", "Placement", "PlacementName", "RoundRobin", "make_placement"]

Pairs = list[tuple[int, int]]
"""Places of a replica and of a micro-batch; neither comes twice."""


@dataclass(frozen=True, eq=False)
class Offer:
    """What a placement chooses from: some replicas, and the micro-batches that have waited longest, oldest first."""

    to_move: DoubleArray
    """Bytes that each replica would have to move for each micro-batch, shape (replicas, batches)."""
    load: DoubleArray
    """Bytes that were still to come to each replica for what it was given, when it last said what it has, shape (replicas,)."""
    free: BoolArray
    """Which replicas can take one, shape (replicas,)."""
    due: int
    """So many micro-batches, from the first, have waited too long: they go before all others."""


class Placement(Protocol):
    """Chooses pairs of a free replica and a micro-batch."""

    def choose(self, offer: Offer) -> Pairs:
        """At most one micro-batch for each free replica, and one for at least one of them; those due first."""


class RoundRobin:
    """Micro-batches in order of arrival, replicas in turn: what any cache is compared with."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, offer: Offer) -> Pairs:
        """The oldest micro-batch to the next free replica in turn."""
        replicas = len(offer.free)
        turn = [(self._next + step) % replicas for step in range(replicas)]
        free = [replica for replica in turn if offer.free[replica]]
        pairs = list(zip(free, range(offer.to_move.shape[1]), strict=False))
        self._next = (pairs[-1][0] + 1) % replicas
        return pairs


class Greedy:
    """As the paper does it (TeleRAG, arXiv 2502.20969): in order of arrival, each to the free replica with most of its lists."""

    def choose(self, offer: Offer) -> Pairs:
        """Each to where the fewest bytes would have to move, ties to the least loaded and then to the lower number."""
        free = np.flatnonzero(offer.free).tolist()
        pairs = []
        for batch in range(min(offer.to_move.shape[1], len(free))):
            replica = min(free, key=lambda each: (offer.to_move[each, batch], offer.load[each], each))
            free.remove(replica)
            pairs.append((replica, batch))
        return pairs


class CacheAware:
    """Shares out what waits among all replicas, so that the fewest bytes move; a free one takes the oldest of its share.

    Each replica has an equal share, and that of a busy one is left for it: what it has the lists of is not given away
    only because another is free now. What it takes of its share is the oldest and not what shares most with its arena,
    because micro-batches come in an order in which neighbours share lists (`telerag_cli.engine.micro_batches.similar`).
    Both are worth something: scripts/schedule_study.py. With one replica this is the order of arrival.
    """

    def choose(self, offer: Offer) -> Pairs:
        """At most one micro-batch for each free replica, and one for at least one of them; those due first."""
        pairs = [] if offer.due else self.of_their_shares(offer)
        # Without any, someone waits too long, or only those that are busy have a share.
        return pairs or self.at_once(offer)

    def of_their_shares(self, offer: Offer) -> Pairs:
        """What each free replica takes of its share, if it has one."""
        replicas, batches = offer.to_move.shape
        owners = np.repeat(np.arange(replicas), -(-batches // replicas))
        rows, columns = _assignment(_cost(offer)[owners])
        owner = np.empty(batches, np.int64)
        owner[columns] = owners[rows]
        shares = [(replica, np.flatnonzero(owner == replica)) for replica in np.flatnonzero(offer.free).tolist()]
        return [(replica, self.next_of(share, offer.to_move[replica])) for replica, share in shares if len(share)]

    def next_of(self, share: IntArray, _to_move: DoubleArray) -> int:
        """Which of the micro-batches of its share, oldest first, a replica takes; it would move so much for each of all."""
        return int(share[0])

    def at_once(self, offer: Offer) -> Pairs:
        """The assignment of micro-batches to free replicas that moves the fewest bytes now."""
        free = np.flatnonzero(offer.free)
        cost = _cost(offer)[free]
        # Those due are in the solution because no sum of others is as low.
        cost[:, : offer.due] -= 1.0 + 2 * len(free) * float(cost.max(initial=0.0))
        rows, columns = _assignment(cost)
        return [(int(free[row]), int(column)) for row, column in zip(rows, columns, strict=True)]


def _cost(offer: Offer) -> DoubleArray:
    """Bytes to move, and those on their way: where replicas cannot all get the same, the least loaded ones get more."""
    cost: DoubleArray = offer.to_move + offer.load[:, None]
    return cost


def _assignment(cost: DoubleArray) -> tuple[IntArray, IntArray]:
    """Rows and columns of the pairs with the least sum, as many as there can be."""
    with needs_extra("ray", "Placement by what caches hold"):
        from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost)
    return rows, columns


def make_placement(name: PlacementName) -> Placement:
    """A fresh placement."""
    placements: dict[PlacementName, Callable[[], Placement]] = {
        PlacementName.CACHE_AWARE: CacheAware,
        PlacementName.GREEDY: Greedy,
        PlacementName.ROUND_ROBIN: RoundRobin,
    }
    return placements[name]()
