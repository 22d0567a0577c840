"""What a pipeline is, and what it may use. Tiers, batching and tracing live under this interface, never in it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from telerag_cli.corpus.passages import Passage
from telerag_cli.generation.base import Message


@dataclass(frozen=True)
class Retrieved:
    """A passage that was found: its row in the index and its score (inner product, or squared L2 distance)."""

    passage: Passage
    row: int
    score: float


class Ahead:
    """Lookahead under way; handed from `Rag.lookahead` to `Rag.generate` and `Rag.retrieve`."""


class Rag(Protocol):
    """What answering one question may use."""

    def lookahead(self, query: str) -> AbstractAsyncContextManager[Ahead]:
        """Move what a query like this one will need while the block runs, and on until something is retrieved."""

    async def generate(
        self, stage: str, messages: Sequence[Message], *, max_tokens: int, refining: Ahead | None = None
    ) -> str:
        """Let the LLM write; what it has written so far refines ``refining``."""

    async def retrieve(self, queries: Sequence[str], ahead: Ahead | None = None) -> list[Retrieved]:
        """The best passages for these queries together, best first, each once."""

    async def answer(self, question: str, found: Sequence[Retrieved]) -> str:
        """Let the LLM answer from the passages."""


Pipeline = Callable[[Rag, str], Awaitable[str]]
"""Answers one question."""
