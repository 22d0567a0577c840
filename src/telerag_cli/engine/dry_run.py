"""Texts that a pipeline writes before it retrieves with lookahead: found by running it with nothing behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from telerag_cli.llm.base import Generation, Message, Token
from telerag_cli.pipelines.base import Ahead, Pipeline, Prompt
from telerag_cli.pipelines.found import Answer, Retrieved
from telerag_cli.pipelines.prompts import answer_prompt

QUESTION = "How do I find the median of some numbers, and which module has it?"
DOUBTFUL = -10.0
"""Log probability that makes any pipeline look things up."""


@dataclass(frozen=True)
class Text:
    """A text that the LLM would write."""

    stage: str
    messages: Sequence[Message]
    max_tokens: int


class _RetrievedAheadError(Exception):
    """The dry run has seen what it wanted."""


@dataclass
class DryRunRag:
    """A `Rag` without an LLM or an index."""

    max_tokens: int
    texts: list[Text] = field(default_factory=list)
    ahead: bool = False

    @contextlib.asynccontextmanager
    async def lookahead(self, query: str) -> AsyncIterator[Ahead]:
        """See `Rag`."""
        if not self.ahead:
            self.texts.clear()  # what came before is not in the window
        self.ahead = True
        yield Ahead()

    async def generate(self, stage: str, messages: Sequence[Message], *, max_tokens: int, **_other: Any) -> Generation:
        """See `Rag`."""
        self.texts.append(Text(stage, messages, max_tokens))
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
        stage: str = "answer",
        prompt: Prompt = answer_prompt,
        max_tokens: int | None = None,
        **_other: Any,
    ) -> Answer:
        """See `Rag`."""
        written = await self.generate(stage, prompt(question, found), max_tokens=max_tokens or self.max_tokens)
        return Answer(written.text, found)


def written_ahead(pipeline: Pipeline, max_tokens: int) -> list[Text]:
    """Return the texts of the first window, for a question of usual length; none if a retrieval comes first."""
    rag = DryRunRag(max_tokens)

    async def run() -> None:
        await pipeline.run(rag, QUESTION)

    try:
        asyncio.run(run())
    except _RetrievedAheadError:
        return rag.texts
    return []
