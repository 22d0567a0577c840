"""Who answers questions: the engine of this process, or several elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from telerag_cli.arrays import BoolArray
from telerag_cli.engine.engine import AskResult, Engine
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.pipelines.base import Pipeline


class Worker(Protocol):
    """Answers micro-batches; several, and all members of each, at once."""

    at_once: int
    """Questions that it answers at once."""

    async def answer(self, batch: MicroBatch, place: int) -> AskResult:
        """Answer one question of a micro-batch; all are asked for at once.

        Raises:
            TeleragError: it cannot be answered.
        """

    def resident(self) -> BoolArray:
        """Which lists are in its arena or on their way, as far as is known, shape (nlist,)."""


@dataclass(eq=False)
class Local:
    """An engine of this process as a `Worker`; it stays the caller's."""

    engine: Engine
    at_once: int
    pipeline: Pipeline | None = None
    """How to answer, if not with the engine's own."""

    async def answer(self, batch: MicroBatch, place: int) -> AskResult:
        """See `Worker`."""
        return await self.engine.aask(batch.questions[place], pipeline=self.pipeline, batch=batch)

    def resident(self) -> BoolArray:
        """See `Worker`."""
        there: BoolArray = ~self.engine.retriever.tier.absent()
        return there
