"""A `Rag` that says what begins, for whoever waits for the answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from telerag_cli.llm.base import Generation, Message
from telerag_cli.pipelines.base import ANSWER, Ahead, Pipeline, Rag
from telerag_cli.pipelines.found import Answer, Retrieved


class Listener(Protocol):
    """Is told, in the event loop, what a pipeline does."""

    def begins(self, stage: str) -> None:
        """The LLM is asked for a text."""

    def retrieving(self) -> None:
        """Passages are looked for."""

    def retrieved(self, found: Sequence[Retrieved]) -> None:
        """Passages were found."""


@dataclass(frozen=True)
class ObservedRag(Rag):
    """Hands everything on, and tells."""

    rag: Rag
    listener: Listener

    def lookahead(self, query: str) -> AbstractAsyncContextManager[Ahead]:
        """See `Rag`."""
        return self.rag.lookahead(query)

    async def generate(self, stage: str, messages: Sequence[Message], **more: Any) -> Generation:
        """See `Rag`."""
        self.listener.begins(stage)
        return await self.rag.generate(stage, messages, **more)

    async def retrieve(self, queries: Sequence[str], ahead: Ahead | None = None) -> list[Retrieved]:
        """See `Rag`."""
        self.listener.retrieving()
        found = await self.rag.retrieve(queries, ahead)
        self.listener.retrieved(found)
        return found

    async def answer(self, question: str, found: Sequence[Retrieved], *, stage: str = ANSWER, **more: Any) -> Answer:
        """See `Rag`."""
        self.listener.begins(stage)
        return await self.rag.answer(question, found, stage=stage, **more)


def with_events(pipeline: Pipeline, listener: Listener) -> Pipeline:
    """The pipeline, and somebody who is told what it does."""

    async def told(rag: Rag, question: str) -> Answer:
        return await pipeline(ObservedRag(rag, listener), question)

    return told
