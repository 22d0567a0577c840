"""The queue of micro-batches before several replicas (or one): who takes which next. Integers only; not thread-safe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from telerag_cli.arrays import BoolArray, IntArray
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.engine.placement import Offer, Placement

LOOKED_AT = 6
"""Micro-batches per replica, oldest first, that one assignment looks at. Few: of those further back nothing in an arena
says yet where they should go. Source: docs/scheduling.md; little changes from 4 to 8."""
MAX_WAITS = 16
"""Rounds in which a micro-batch may be passed over for a younger one; then it goes before all that are younger."""


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
        """Begin with an empty queue.

        Args:
            list_bytes: bytes each list takes, shape (nlist,).
            placement: who takes which.
        """
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

        Args:
            states: of all replicas that live, also of those that are not free: what waits may suit them better.

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
