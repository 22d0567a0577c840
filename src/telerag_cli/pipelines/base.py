"""What a pipeline is, and what it may use. Tiers, batching and tracing live under this interface, never in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, TypeVar, Unpack

from telerag_cli.config import model_name
from telerag_cli.corpus.passages import Retrieved
from telerag_cli.llm.base import Generation, Message
from telerag_cli.llm.shapes import Shape
from telerag_cli.pipelines.prompts import answer_prompt

ANSWER = "answer"
"""The stage whose text is the answer."""


def is_answer(stage: str) -> bool:
    """Whether a stage's text may be the answer: it is the only one, or one of several of which the best is kept."""
    return stage == ANSWER or stage.startswith(f"{ANSWER}_")


@dataclass(frozen=True)
class Answer:
    """A text and the passages that it was written from; ``[1]`` in the text is the first of them."""

    text: str
    found: Sequence[Retrieved] = ()
    in_prompt: int | None = None
    """How many of them, the first ones, fitted the prompt; None for all. Only those can be cited."""


def merge(*found: Sequence[Retrieved]) -> list[Retrieved]:
    """Passages of several retrievals in one order: everyone's first, then everyone's second, each passage once."""
    depth = max(map(len, found), default=0)
    ranked = (hits[rank] for rank in range(depth) for hits in found if rank < len(hits))
    return list({hit.row: hit for hit in ranked}.values())


class Ahead:
    """Lookahead under way; handed from `Rag.lookahead` to the text that it is to follow."""


Expect = Callable[[str], Sequence[str]]
"""The queries to which a text will probably lead, by what is written of it so far; none yet is an empty sequence."""

Prompt = Callable[[str, Sequence[Retrieved]], Sequence[Message]]
"""Makes the prompt from a question and as many of the passages as fit."""


class WritingOptions(TypedDict, total=False):
    """How a text is written; for the first three see `Request`."""

    stop: tuple[str, ...]
    shape: Shape | None
    logprobs: bool
    refining: Ahead
    """The lookahead that follows the text as it grows."""
    expect: Expect
    """What will be searched, by the text so far; the text itself if not given."""


class Rag(Protocol):
    """What answering one question may use."""

    def lookahead(self, query: str) -> AbstractAsyncContextManager[Ahead]:
        """Move what a query like this one will need while the block runs, and on until something is retrieved."""

    async def generate(
        self, stage: str, messages: Sequence[Message], *, max_tokens: int, **how: Unpack[WritingOptions]
    ) -> Generation:
        """Let the LLM write a text of at most ``max_tokens``; ``stage`` names the call in timings and traces."""

    async def retrieve(self, queries: Sequence[str]) -> list[Retrieved]:
        """The best passages for these queries together, best first, each once; all lookahead of the question ends."""

    async def answer(
        self,
        question: str,
        found: Sequence[Retrieved],
        *,
        stage: str = ANSWER,
        prompt: Prompt = answer_prompt,
        max_tokens: int | None = None,
        **how: Unpack[WritingOptions],
    ) -> Answer:
        """Let the LLM answer from as many of the passages as its context holds, best first.

        ``max_tokens`` is what the user wants for an answer if not given.
        """


@dataclass(frozen=True)
class Pipeline:
    """A way to answer a question."""

    name: str
    """Its name in output lines and traces; what is learned of its stages is kept under it."""
    run: Callable[[Rag, str], Awaitable[Answer]]
    """Answers one question."""

    @property
    def model(self) -> str:
        """The model's name by which clients of OpenAI's API ask for it."""
        return model_name(self.name)


class Listener:
    """Hears, in the event loop, what happens to a question; every method does nothing unless it is overridden."""

    def rewritten(self, question: str) -> None:
        """The question leans on earlier ones, and this is what it means."""

    def begins(self, stage: str) -> None:
        """The LLM is asked for a text."""

    async def prompted(self, stage: str, messages: Sequence[Message]) -> None:
        """The LLM is given this prompt."""

    def counted(self, stage: str, tokens: int) -> None:
        """A stage has written so many tokens so far. Called from any thread; must return quickly."""

    def wrote(self, stage: str, text: str) -> None:
        """All that a stage has written so far. Called from any thread; must return quickly."""

    def retrieving(self) -> None:
        """Passages are searched."""

    def retrieved(self, found: Sequence[Retrieved]) -> None:
        """Passages were found."""


T = TypeVar("T")


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. If one fails or all are cancelled, none is still running when that comes through."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
