"""The queue of micro-batches before several replicas (or one): who takes which next. Integers only; not thread-safe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from telerag_cli.arrays import BoolArray, IntArray
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.engine.placement import Offer, Placement

LOOKED_AT = 6
"""Micro-batches per replica, oldest first, that one assignment looks at. Few: of those further back nothing in an arena says
yet where they should go. Source: scripts/schedule_study.py, which hardly changes from 4 to 8."""
MAX_WAITS = 16
"""Rounds in which a micro-batch may be passed over for a younger one."""


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
    """Holds micro-batches until a replica takes them; each comes out once for each time it was put in.

    A micro-batch may be passed over for a younger one that suits a replica better, but only in ``most_waits`` rounds;
    then it goes before all that are younger.
    """

    def __init__(self, list_bytes: IntArray, placement: Placement, *, most_waits: int = MAX_WAITS) -> None:
        """Begin with an empty queue.

        Args:
            list_bytes: bytes each list takes, shape (nlist,).
            placement: who takes which.
            most_waits: rounds in which a micro-batch may be passed over.
        """
        assert most_waits >= 0
        self._extents = list_bytes.astype(np.float64)
        self._placement = placement
        self._most_waits = most_waits
        self._queue: list[_Waiting] = []
        self._numbers: set[int] = set()

    @property
    def waiting(self) -> int:
        """Micro-batches in the queue."""
        return len(self._queue)

    def add(self, batches: Iterable[MicroBatch]) -> None:
        """Put micro-batches at the end of the queue."""
        for batch in batches:
            self._enter(batch)
            self._queue.append(_Waiting(batch))

    def again(self, batch: MicroBatch) -> None:
        """Put one whose replica died at the front of the queue; nobody goes before it."""
        self._enter(batch)
        self._queue.insert(0, _Waiting(batch, self._most_waits))

    def assign(self, states: Sequence[ReplicaState]) -> list[tuple[int, MicroBatch]]:
        """Take micro-batches out of the queue until it is empty or no replica is free.

        Args:
            states: of all replicas that live, those that are not free too: what waits may suit them better.

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
                self._numbers.remove(batch.number)
            self._take_out(places)
        return given

    def _enter(self, batch: MicroBatch) -> None:
        assert batch.lists.shape == self._extents.shape
        assert batch.number not in self._numbers, "a micro-batch waits already"
        self._numbers.add(batch.number)

    def _take_out(self, places: set[int]) -> None:
        youngest = max(places)
        for place, each in enumerate(self._queue[:youngest]):
            if place not in places:
                assert each.passed_over < self._most_waits, "a micro-batch that is due was passed over"
                each.passed_over += 1
        self._queue[: youngest + 1] = [
            each for place, each in enumerate(self._queue[: youngest + 1]) if place not in places
        ]

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
        wanted = np.stack([each.batch.lists for each in window]) * self._extents
        load = [float(self._extents[mine & ~state.resident].sum()) for mine, state in zip(held, states, strict=True)]
        due = 0
        while due < len(window) and window[due].passed_over >= self._most_waits:
            due += 1
        return Offer(
            to_move=(~held).astype(np.float64) @ wanted.T, load=np.array(load), free=free, due=min(due, int(free.sum()))
        )
