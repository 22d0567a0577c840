"""Which texts a pipeline writes before it first retrieves with lookahead: found by a run with nothing behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from telerag_cli.llm.base import Generation, Message, Token
from telerag_cli.pipelines.base import ANSWER, Ahead, Pipeline, Prompt
from telerag_cli.pipelines.found import Answer, Retrieved
from telerag_cli.pipelines.prompts import answer_prompt

QUESTION = "How do I find the median of some numbers, and which module has it?"
DOUBTFUL = -10.0
"""A logarithm of a probability that makes any pipeline look things up."""


@dataclass(frozen=True)
class PlannedText:
    """A text that the LLM would write."""

    stage: str
    messages: Sequence[Message]
    max_tokens: int


class _RetrievedAheadError(Exception):
    """The dry run has seen what it wanted."""


@dataclass
class DryRunRag:
    """A `Rag` with no LLM and no index."""

    max_tokens: int
    texts: list[PlannedText] = field(default_factory=list)
    ahead: bool = False

    @contextlib.asynccontextmanager
    async def lookahead(self, query: str) -> AsyncIterator[Ahead]:
        """See `Rag`."""
        if not self.ahead:
            self.texts.clear()  # what came before is not part of the window
        self.ahead = True
        yield Ahead()

    async def generate(self, stage: str, messages: Sequence[Message], *, max_tokens: int, **_how: Any) -> Generation:
        """See `Rag`."""
        self.texts.append(PlannedText(stage, messages, max_tokens))
        return Generation(QUESTION, "stop", 1, max_tokens, 0.0, 0.0, tokens=(Token(0, len(QUESTION), DOUBTFUL),))

    async def retrieve(self, queries: Sequence[str], ahead: Ahead | None = None) -> list[Retrieved]:
        """See `Rag`."""
        if self.ahead:
            raise _RetrievedAheadError
        return []

    async def answer(
        self,
        question: str,
        found: Sequence[Retrieved],
        *,
        stage: str = ANSWER,
        prompt: Prompt = answer_prompt,
        max_tokens: int | None = None,
        **_how: Any,
    ) -> Answer:
        """See `Rag`."""
        written = await self.generate(stage, prompt(question, found), max_tokens=max_tokens or self.max_tokens)
        return Answer(written.text, found)


def written_ahead(pipeline: Pipeline, max_tokens: int) -> list[PlannedText]:
    """The texts of the first window, for a question of usual length; none if nothing is written before a retrieval."""

    async def dry_run() -> None:
        await pipeline.run(rag, QUESTION)

    rag = DryRunRag(max_tokens)
    try:
        asyncio.run(dry_run())
    except _RetrievedAheadError:
        return rag.texts
    return []
