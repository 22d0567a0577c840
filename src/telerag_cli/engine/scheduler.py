"""Cuts questions into micro-batches, and keeps those until a worker takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.config import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_MAX_WAIT_S,
    DEFAULT_MICRO_BATCH,
    PlacementName,
    ReplicaConfig,
    ScheduleConfig,
    ScheduleName,
)
from telerag_cli.engine.dispatch import Dispatcher, make_placement
from telerag_cli.engine.engine import Engine
from telerag_cli.engine.grouping import HORIZON, arrival, likely, similar
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.errors import UsageError
from telerag_cli.index.artifact import Index
from telerag_cli.retrieval.retriever import QueryEmbedder

EMBEDDED_TOGETHER = 32
"""Questions embedded in one call: an LLM that decodes on the same cores waits for it."""
LOOKED_DOWN = 4
"""Lists compared for each question, as a multiple of ``nprobe``; see `likely`."""

Rank = Callable[[FloatArray, int], IntArray]
"""Returns the given number of lists nearest to queries of shape (n, dimension): shape (n, count), nearest first."""


@dataclass(frozen=True)
class Schedule:
    """How questions are put together, and who answers which."""

    name: ScheduleName = ScheduleName.SIMILAR
    placement: PlacementName = PlacementName.CACHE_AWARE
    batch_size: int = DEFAULT_BATCH_SIZE
    """Questions compared with each other."""
    micro_batch: int = 1
    """Questions that run together."""
    max_wait_s: float = DEFAULT_MAX_WAIT_S
    """For which a question waits for others at most."""


def scheduled(config: ScheduleConfig, at_once: int, arena_bytes: int, index: Index, nprobe: int) -> Schedule:
    """The schedule that was asked for, with micro-batches that fit a worker, and batches of at least one of them.

    By default a micro-batch has `DEFAULT_MICRO_BATCH` questions, or half of ``at_once`` if that is less, so that the
    next one can begin while one ends; and no more than the arena holds the lists of.

    A worker answers ``at_once`` questions at once and has an arena of ``arena_bytes``.

    Raises:
        UsageError: more questions are to run together than are answered at once.
    """
    size = config.micro_batch
    if size is not None and size > at_once:
        raise UsageError(
            f"--micro-batch is {size} and {at_once} questions are answered at once.",
            remedy="Lower --micro-batch, or raise --concurrency.",
        )
    fitting = int(arena_bytes / max(float(index.list_bytes.mean()) * nprobe, 1.0))
    size = size or max(1, min(DEFAULT_MICRO_BATCH, at_once // 2, fitting))
    placement = config.placement if isinstance(config, ReplicaConfig) else PlacementName.CACHE_AWARE
    return Schedule(config.schedule, placement, max(config.batch_size, size), size, config.max_wait)


class Scheduler:
    """Makes micro-batches of questions, and keeps them until a worker takes them."""

    def __init__(
        self, schedule: Schedule, embedder: QueryEmbedder, rank: Rank, list_bytes: IntArray, nprobe: int, workers: int
    ) -> None:
        """Begin with an empty queue.

        ``rank`` says which lists questions will probably probe; ``list_bytes`` has shape (nlist,).
        """
        self.schedule = schedule
        self._embedder = embedder
        self._rank = rank
        self._list_bytes = list_bytes
        self._nprobe = nprobe
        self._alone = workers == 1
        self._depth = min(LOOKED_DOWN * nprobe, len(list_bytes))
        self._before: FloatArray | None = None
        """What the queries that were cut last will probably probe, because that is what the arena holds."""
        # A single worker gets the next micro-batch whatever it holds.
        placement = PlacementName.ROUND_ROBIN if self._alone else schedule.placement
        self._compares = schedule.name is not ScheduleName.ARRIVAL or placement is not PlacementName.ROUND_ROBIN
        self.queue = Dispatcher(list_bytes, make_placement(placement))
        self._made = 0

    @classmethod
    def over(cls, engine: Engine, schedule: Schedule) -> Scheduler:
        """For questions that an engine of this process answers alone."""
        retriever = engine.retriever
        return cls(schedule, engine.embedder, retriever.nearest, retriever.tier.list_bytes, engine.nprobe, 1)

    def cut(self, questions: Sequence[str], *, compare: bool = True) -> list[MicroBatch]:
        """Micro-batches of these questions, in the order in which they should run; their members are places.

        It takes milliseconds per question unless ``compare`` is off, so it is not for an event loop. Questions in
        order of arrival, and a single one for a single worker, are compared with nothing either.
        """
        compare = compare and self._compares and not (self._alone and len(questions) == 1)
        vectors = self._embed(questions) if compare else None
        ranked = None if vectors is None else self._rank(vectors, self._depth)
        batches = []
        for some in self._grouped(len(questions), ranked):
            lists = np.zeros(len(self._list_bytes), np.bool_)
            if ranked is not None:
                lists[ranked[some, : self._nprobe].ravel()] = True
            texts = tuple(questions[place] for place in some)
            known = None if vectors is None else vectors[some]
            batches.append(MicroBatch(texts, known, self._made, tuple(some.tolist()), lists))
            self._made += 1
        return batches

    def _grouped(self, count: int, ranked: IntArray | None) -> list[IntArray]:
        """Places of each micro-batch, by the lists ranked for each question, shape (count, depth), if there are any."""
        size = self.schedule.micro_batch
        if ranked is None or self.schedule.name is ScheduleName.ARRIVAL:
            return arrival(count, size)
        vectors = likely(ranked, self._nprobe, self._list_bytes)
        places = similar(vectors, size, self._before)
        ran = [] if self._before is None else [self._before]
        self._before = np.concatenate([*ran, vectors[np.concatenate(places)]])[-HORIZON * size :]
        return places

    def _embed(self, questions: Sequence[str]) -> FloatArray:
        starts = range(0, len(questions), EMBEDDED_TOGETHER)
        return np.concatenate(
            [self._embedder.encode_queries(questions[start : start + EMBEDDED_TOGETHER]) for start in starts]
        )
