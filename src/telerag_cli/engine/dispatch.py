"""The queue of micro-batches before several replicas (or one), and who takes which next; not thread-safe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from telerag_cli.arrays import BoolArray, DoubleArray, IntArray
from telerag_cli.config import PlacementName
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.errors import needs_extra

LOOKED_AT = 6
"""Micro-batches per replica, oldest first, that one assignment looks at. Few: of those further back nothing in an arena
says yet where they should go. Source: docs/scheduling.md; little changes from 4 to 8."""
MAX_WAITS = 16
"""Rounds in which a micro-batch may be passed over for a younger one; then it goes before all that are younger."""

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


@dataclass(frozen=True, eq=False)
class ReplicaState:
    """What is known of a replica when micro-batches are given out."""

    replica: int
    """Its number."""
    free: int
    """Micro-batches that it can take now."""
    resident: BoolArray
    """Lists in its arena as it last said, shape (nlist,)."""
    under_way: tuple[MicroBatch, ...] = ()
    """Given to it and not done: what they need is there or coming."""


@dataclass(eq=False)
class _Waiting:
    batch: MicroBatch
    passed_over: int = 0


class Dispatcher:
    """Holds micro-batches until a replica takes them; each comes out once."""

    def __init__(self, list_bytes: IntArray, placement: Placement) -> None:
        """Begin with an empty queue."""
        self._list_bytes = list_bytes.astype(np.float64)
        self._placement = placement
        self._queue: list[_Waiting] = []

    @property
    def waiting(self) -> int:
        """Micro-batches in the queue."""
        return len(self._queue)

    def add(self, batches: Iterable[MicroBatch]) -> None:
        """Put micro-batches at the end of the queue."""
        numbers = {each.batch.number for each in self._queue}
        for batch in batches:
            assert batch.lists.shape == self._list_bytes.shape
            assert batch.number not in numbers, "a micro-batch waits already"
            numbers.add(batch.number)
            self._queue.append(_Waiting(batch))

    def assign(self, states: Sequence[ReplicaState]) -> list[tuple[int, MicroBatch]]:
        """Take micro-batches out of the queue until it is empty or no replica is free.

        Give the states of all replicas that live, also of those that are not free: what waits may suit them better.

        Returns:
            The replica's number and its micro-batch, in the order in which a replica should run them.
        """
        assert len({state.replica for state in states}) == len(states), "two states of one replica"
        free = np.array([state.free for state in states], np.int64)
        coming = [list(state.under_way) for state in states]
        given: list[tuple[int, MicroBatch]] = []
        while self._queue and (free > 0).any():
            window = self._queue[: LOOKED_AT * len(states)]
            pairs = self._placement.choose(self._offer(states, coming, free > 0, window))
            assert pairs, "a replica is free and gets nothing"
            replicas, places = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
            assert len(replicas) == len(places) == len(pairs), "a replica or a micro-batch comes twice"
            for replica, place in pairs:
                batch = window[place].batch
                free[replica] -= 1
                assert free[replica] >= 0, "a replica gets more than it can take"
                coming[replica].append(batch)
                given.append((states[replica].replica, batch))
            self._take_out(places)
        return given

    def _take_out(self, places: set[int]) -> None:
        end = max(places) + 1
        left = [each for place, each in enumerate(self._queue[:end]) if place not in places]
        for each in left:
            assert each.passed_over < MAX_WAITS, "a micro-batch that is due was passed over"
            each.passed_over += 1
        self._queue[:end] = left

    def _offer(
        self,
        states: Sequence[ReplicaState],
        coming: Sequence[Sequence[MicroBatch]],
        free: BoolArray,
        window: Sequence[_Waiting],
    ) -> Offer:
        held = np.stack(
            [
                np.logical_or.reduce([state.resident, *(batch.lists for batch in batches)])
                for state, batches in zip(states, coming, strict=True)
            ]
        )
        wanted = np.stack([each.batch.lists for each in window]) * self._list_bytes
        load = [self._list_bytes[mine & ~state.resident].sum() for mine, state in zip(held, states, strict=True)]
        due = next((place for place, each in enumerate(window) if each.passed_over < MAX_WAITS), len(window))
        to_move = (~held).astype(np.float64) @ wanted.T
        return Offer(to_move, load=np.array(load), free=free, due=min(due, int(free.sum())))
