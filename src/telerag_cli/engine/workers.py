"""Who answers questions: the engine of this process, or several elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from telerag_cli.arrays import BoolArray
from telerag_cli.engine.engine import Answered, Engine
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.pipelines.base import Pipeline


class Seats(Protocol):
    """Room for a number of questions, beside an arena."""

    at_once: int
    """Questions that are answered at once."""

    def resident(self) -> BoolArray:
        """Which lists are in the arena or on their way, as far as is known, shape (nlist,)."""


class Worker(Seats, Protocol):
    """Answers micro-batches; several, and all members of each, at once."""

    async def answer(self, batch: MicroBatch, place: int) -> Answered:
        """Answer one question of a micro-batch; all are asked for at once.

        Raises:
            TeleragError: it cannot be answered.
        """


@dataclass(eq=False)
class EngineSeats:
    """The `Seats` of an engine of this process; it stays the caller's."""

    engine: Engine
    at_once: int

    def resident(self) -> BoolArray:
        """See `Seats`."""
        there: BoolArray = ~self.engine.retriever.tier.absent()
        return there


@dataclass(eq=False)
class Local(EngineSeats):
    """An engine of this process as a `Worker`."""

    pipeline: Pipeline

    async def answer(self, batch: MicroBatch, place: int) -> Answered:
        """See `Worker`."""
        return await self.engine.aask(batch.questions[place], pipeline=self.pipeline, batch=batch)
