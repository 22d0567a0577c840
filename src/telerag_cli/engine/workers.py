"""Who answers questions: the engine of this process, or several elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from telerag_cli.engine.company import Company
from telerag_cli.engine.engine import Answered, Engine
from telerag_cli.index.artifact import FloatArray
from telerag_cli.pipelines.base import Pipeline
from telerag_cli.tiers.residency import BoolArray


@dataclass(frozen=True, eq=False)
class Together:
    """The questions of a micro-batch."""

    number: int
    """Its own in this run."""
    questions: tuple[str, ...]
    vectors: FloatArray | None
    """Their embeddings, shape (n, dimension), if they are known."""


class Worker(Protocol):
    """Answers micro-batches; several, and all members of each, at once."""

    at_once: int
    """Questions."""

    async def answer(self, together: Together, place: int) -> Answered:
        """Answer one question of a micro-batch; all are asked for at once.

        Raises:
            TeleragError: it cannot be answered.
        """

    def resident(self) -> BoolArray:
        """Which lists are in its arena or on their way, as far as is known, shape (nlist,)."""


class Local:
    """The engine of this process."""

    def __init__(self, engine: Engine, pipeline: Pipeline, name: str, at_once: int) -> None:
        """Take an engine.

        Args:
            engine: it stays the caller's.
            pipeline: how to answer.
            name: of the pipeline.
            at_once: questions.
        """
        self.at_once = at_once
        self.engine = engine
        self._pipeline = pipeline
        self._name = name
        self._companies: dict[int, tuple[Company, int]] = {}

    async def answer(self, together: Together, place: int) -> Answered:
        """See `Worker`."""
        company, present = self._companies.get(together.number) or (Company(together.questions, together.vectors), 0)
        self._companies[together.number] = company, present + 1
        try:
            return await self.engine.ask(self._pipeline, together.questions[place], name=self._name, company=company)
        finally:
            company, present = self._companies.pop(together.number)
            if present > 1:
                self._companies[together.number] = company, present - 1
            else:
                company.end()

    def resident(self) -> BoolArray:
        """See `Worker`."""
        there: BoolArray = ~self.engine.retriever.tier.absent()
        return there
