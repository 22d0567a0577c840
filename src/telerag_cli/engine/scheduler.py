"""The prefetching scheduler of a run: cuts the questions that are there into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.config import DEFAULT_BATCH_SIZE, DEFAULT_MAX_WAIT_S, DEFAULT_MICRO_BATCH, PlacementName, ScheduleName
from telerag_cli.engine.dispatch import Dispatcher
from telerag_cli.engine.engine import Engine
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.engine.micro_batches import HORIZON, arrival, likely, similar
from telerag_cli.engine.placement import make_placement
from telerag_cli.engine.retrieval import QueryEmbedder
from telerag_cli.errors import UsageError

EMBEDDED_TOGETHER = 32
"""Questions embedded in one call: an LLM that decodes on the same cores waits for it."""
LOOKED_DOWN = 4
"""So many times the lists that will be probed are looked at to compare questions; see `likely`."""


Rank = Callable[[FloatArray, int], IntArray]
"""The so many lists nearest to queries of shape (n, dimension): (n, count), nearest first."""


@dataclass(frozen=True)
class Schedule:
    """How questions are put together, and who answers which."""

    name: ScheduleName = ScheduleName.SIMILAR
    placement: PlacementName = PlacementName.CACHE_AWARE
    batch_size: int = DEFAULT_BATCH_SIZE
    """Questions looked at together."""
    micro_batch: int = 1
    """Questions that run together."""
    max_wait_s: float = DEFAULT_MAX_WAIT_S
    """For which a question waits for others at most."""


def micro_batch_size(given: int | None, at_once: int, arena_bytes: int, probed_bytes: float) -> int:
    """How many questions run together.

    Args:
        given: what the user said, if anything.
        at_once: questions that a replica answers at once.
        arena_bytes: of a replica.
        probed_bytes: that one question probes, about.

    Returns:
        By default `DEFAULT_MICRO_BATCH`, or half of ``at_once`` if that is less, so that the next micro-batch can begin
        while one ends; and no more than the arena holds the lists of.

    Raises:
        UsageError: more are wanted than run at once.
    """
    if given is not None and given > at_once:
        raise UsageError(
            f"--micro-batch is {given} and {at_once} questions are answered at once.",
            remedy="Lower --micro-batch, or raise --concurrency.",
        )
    if given is not None:
        return given
    fitting = int(arena_bytes / max(probed_bytes, 1.0))
    return max(1, min(DEFAULT_MICRO_BATCH, at_once // 2, fitting))


def fitted(
    wish: Schedule, micro_batch: int | None, at_once: int, arena_bytes: int, list_bytes: IntArray, nprobe: int
) -> Schedule:
    """A schedule with micro-batches of the size that fits, and batches of one of them at least; see `micro_batch_size`.

    Args:
        wish: all else of it.
        micro_batch: what the user said of the size, if anything.
        at_once: questions that a replica answers at once.
        arena_bytes: of a replica.
        list_bytes: bytes each list takes, shape (nlist,).
        nprobe: lists that a query probes.
    """
    size = micro_batch_size(micro_batch, at_once, arena_bytes, float(list_bytes.mean()) * nprobe)
    return replace(wish, micro_batch=size, batch_size=max(wish.batch_size, size))


class Grouping:
    """Which of some questions run together; what was cut before is remembered, because it is what the arena holds."""

    def __init__(self, schedule: Schedule, list_bytes: IntArray, nprobe: int) -> None:
        """Begin with nothing before.

        Args:
            schedule: how.
            list_bytes: bytes each list takes, shape (nlist,).
            nprobe: lists that a query probes.
        """
        self.depth = min(LOOKED_DOWN * nprobe, len(list_bytes))
        """Of the lists ranked for a question, as many as are looked at."""
        self._schedule = schedule
        self._extents = list_bytes
        self._nprobe = nprobe
        self._before: FloatArray | None = None

    def cut(self, count: int, ranked: IntArray | None) -> list[IntArray]:
        """Places of each micro-batch.

        Args:
            count: questions.
            ranked: the lists nearest to each, best first, shape (count, depth); not needed in order of arrival.
        """
        size = self._schedule.micro_batch
        if ranked is None or self._schedule.name is ScheduleName.ARRIVAL:
            return arrival(count, size)
        vectors = likely(ranked, self._nprobe, self._extents)
        places = similar(vectors, size, self._before)
        ran = [] if self._before is None else [self._before]
        self._before = np.concatenate([*ran, vectors[np.concatenate(places)]])[-HORIZON * size :]
        return places


class Scheduler:
    """Makes micro-batches of questions, and keeps them until a worker takes them."""

    def __init__(
        self, schedule: Schedule, embedder: QueryEmbedder, rank: Rank, list_bytes: IntArray, nprobe: int, workers: int
    ) -> None:
        """Begin with an empty queue.

        Args:
            schedule: how.
            embedder: embeds questions, where it matters what they are about.
            rank: says which lists they will probably probe.
            list_bytes: bytes each list takes, shape (nlist,).
            nprobe: lists that a query probes.
            workers: how many there are.
        """
        self.schedule = schedule
        self._embedder = embedder
        self._rank = rank
        self._extents = list_bytes
        self._nprobe = nprobe
        self._grouping = Grouping(schedule, list_bytes, nprobe)
        in_order = schedule.name is ScheduleName.ARRIVAL
        # One worker gets the next whatever it holds, if the order is to be that of arrival.
        name = PlacementName.ROUND_ROBIN if in_order and workers == 1 else schedule.placement
        self._looks = not in_order or name is not PlacementName.ROUND_ROBIN
        self.queue = Dispatcher(list_bytes, make_placement(name))
        self._number = 0

    @classmethod
    def over(cls, engine: Engine, schedule: Schedule) -> Scheduler:
        """For questions that an engine of this process answers alone."""
        retriever = engine.retriever
        return cls(schedule, engine.embedder, retriever.nearest, retriever.tier.list_bytes, engine.settings.nprobe, 1)

    def cut(self, questions: Sequence[str], members: Sequence[int]) -> list[MicroBatch]:
        """Micro-batches of these questions; takes milliseconds for each of them, so not for an event loop.

        Args:
            questions: some questions.
            members: the caller's numbers of them.

        Returns:
            Micro-batches in the order in which they should run.
        """
        vectors = self._embed(questions) if self._looks else None
        ranked = None if vectors is None else self._rank(vectors, self._grouping.depth)
        made = []
        for some in self._grouping.cut(len(questions), ranked):
            lists = np.zeros(len(self._extents), np.bool_)
            if ranked is not None:
                lists[ranked[some, : self._nprobe].ravel()] = True
            batch = MicroBatch(
                tuple(questions[place] for place in some),
                None if vectors is None else vectors[some],
                self._number,
                tuple(members[place] for place in some),
                lists,
            )
            made.append(batch)
            self._number += 1
        return made

    def _embed(self, questions: Sequence[str]) -> FloatArray:
        return np.concatenate(
            [
                self._embedder.encode_queries(questions[start : start + EMBEDDED_TOGETHER])
                for start in range(0, len(questions), EMBEDDED_TOGETHER)
            ]
        )
