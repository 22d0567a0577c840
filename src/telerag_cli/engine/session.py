"""What one question uses while it is answered: the `Rag` that its pipeline sees."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self, Unpack

from telerag_cli.config import AnswerConfig, Lookahead
from telerag_cli.corpus.passages import Retrieved
from telerag_cli.engine.forecast import Forecast, Prediction
from telerag_cli.engine.micro_batch import MicroBatch, give_up
from telerag_cli.engine.refinement import RefinementEmbedder, Refiner
from telerag_cli.errors import ContextError
from telerag_cli.llm.base import Generation, Generator, Message, OnText, Request, counted
from telerag_cli.pipelines.base import ANSWER, Ahead, Answer, Expect, Listener, Prompt, WritingOptions, is_answer
from telerag_cli.pipelines.prompts import answer_prompt
from telerag_cli.planning.averages import Averages
from telerag_cli.planning.planner import ExpectedText, Planner
from telerag_cli.prefetch.prefetcher import Prefetch
from telerag_cli.retrieval.retriever import Finder, Retrieval, Retriever
from telerag_cli.tracing import Tracer

LLM = "LLM"


@dataclass(frozen=True)
class Stage:
    """One LLM call: its name, what was asked, and what came of it."""

    name: str
    request: Request
    generation: Generation
    began_s: float
    """By `time.perf_counter`."""
    took_s: float
    expected: ExpectedText | None
    """What the profile says of a text of this length, if there is one."""


class Writing:
    """How many texts are being written now. For one event loop."""

    def __init__(self) -> None:
        self.now = 0

    @contextlib.contextmanager
    def one_more(self) -> Iterator[int]:
        """Count one while the block runs; yields how many there are with it."""
        self.now += 1
        try:
            yield self.now
        finally:
            self.now -= 1


@dataclass(frozen=True)
class Shared:
    """What all questions use together."""

    generator: Generator
    retriever: Retriever
    retrievals: Finder
    refinement_embedder: RefinementEmbedder
    config: AnswerConfig
    """How this question is answered."""
    nprobe: int
    averages: Averages
    planner: Planner | None
    writing: Writing
    tracer: Tracer


@dataclass(frozen=True)
class _Ahead(Ahead):
    """Lookahead of a session that has it on."""

    prefetch: Future[Prefetch]


@dataclass
class Session:
    """One question's way through its pipeline, and all that is noted of it."""

    shared: Shared
    forecast: Forecast
    batch: MicroBatch
    listener: Listener | None = None
    stages: list[Stage] = field(default_factory=list)
    retrievals: list[Retrieval] = field(default_factory=list)
    plans: list[Prediction] = field(default_factory=list)
    """Of the retrievals that lookahead prepared."""
    timings: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds of each stage, summed over its calls."""
    dropped: int = 0
    """Passages that did not fit a prompt."""
    _prefetches: list[Future[Prefetch]] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def lookahead(self, query: str) -> AsyncIterator[Ahead]:
        """See `Rag`. It goes on after the block, until the next retrieval, and ends with the session at the latest."""
        shared = self.shared
        if shared.config.lookahead is Lookahead.OFF:
            yield Ahead()
            return
        refining = shared.config.lookahead is Lookahead.REFINED

        start = partial(shared.retriever.prefetch_batch, nprobe=shared.nprobe, refining=refining)
        prefetch = self.batch.lookahead(query, start, shared.refinement_embedder)
        self._prefetches.append(prefetch)
        self.forecast.lookahead_begins()
        yield _Ahead(prefetch)

    async def generate(
        self, stage: str, messages: Sequence[Message], *, max_tokens: int, **how: Unpack[WritingOptions]
    ) -> Generation:
        """See `Rag`."""
        if self.listener:
            self.listener.begins(stage)
            await self.listener.prompted(stage, messages)
        config = self.shared.config
        request = Request(
            messages,
            max_tokens,
            config.temperature,
            config.top_p,
            config.seed,
            how.get("stop", ()),
            how.get("shape"),
            how.get("logprobs", False),
        )
        refiner = self._refiner(stage, max_tokens, how.get("refining"), how.get("expect"))
        started_s = time.perf_counter()
        with self.shared.tracer.lane(LLM) as lane, self.shared.writing.one_more() as width:
            await self.forecast.writes(stage, partial(counted, self.shared.generator, messages), max_tokens, width)
            generation = await self.shared.generator.generate(request, self._on_text(stage, refiner))
            ended_s = time.perf_counter()
            self.shared.tracer.add(
                lane,
                stage,
                started_s,
                ended_s,
                prompt_tokens=generation.prompt_tokens,
                completion_tokens=generation.completion_tokens,
                cached_tokens=generation.cached_tokens,
            )
        if refiner:
            refiner.end()
        expected = self.forecast.wrote(stage, generation, width)
        took_s = ended_s - started_s
        self.timings[f"{stage}_s"] += took_s
        self.timings["llm_s"] += took_s
        self.stages.append(Stage(stage, request, generation, started_s, took_s, expected))
        return generation

    async def retrieve(self, queries: Sequence[str]) -> list[Retrieved]:
        """See `Rag`."""
        if self.listener:
            self.listener.retrieving()
        started_s = time.perf_counter()
        # What has not begun by now would only begin to move what is being searched.
        prefetches = [await asyncio.wrap_future(future) for future in self._prefetches if not future.cancel()]
        retrieval = await self.shared.retrievals.find(queries, prefetches)
        self._prefetches.clear()
        self.retrievals.append(retrieval)
        if plan := self.forecast.retrieved(retrieval.join, self.shared.config.lookahead):
            self.plans.append(plan)
        self.timings["embed_s"] += retrieval.embed_s
        self.timings["join_s"] += retrieval.join.join_s
        self.timings["retrieval_s"] += time.perf_counter() - started_s
        if self.listener:
            self.listener.retrieved(retrieval.found)
        return retrieval.found

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
        """See `Rag`."""
        generator, config = self.shared.generator, self.shared.config
        longest = max_tokens or config.max_tokens
        if is_answer(stage):
            how["stop"], how["shape"] = (*how.get("stop", ()), *config.stop), config.shape
            prompt = _instructed(prompt, config.instructions)
        count = partial(counted, generator)
        messages, kept = await fit(question, found, prompt, generator.context_tokens - longest, count)
        self.dropped += len(found) - kept
        generation = await self.generate(stage, messages, max_tokens=longest, **how)
        return Answer(generation.text, found, kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop lookahead that nothing retrieved from."""
        for prefetch in self._prefetches:
            give_up(prefetch)

    def _refiner(self, stage: str, max_tokens: int, ahead: Ahead | None, expect: Expect | None) -> Refiner | None:
        shared = self.shared
        if shared.config.lookahead is not Lookahead.REFINED or not isinstance(ahead, _Ahead):
            return None
        expected = self.forecast.expected_tokens(stage, max_tokens)
        return Refiner(ahead.prefetch, shared.retriever, shared.nprobe, expected, shared.refinement_embedder, expect)

    def _on_text(self, stage: str, refiner: Refiner | None) -> OnText | None:
        listener = self.listener
        if listener is None:
            return refiner

        def on_text(text: str, tokens: int) -> None:
            listener.counted(stage, tokens)
            listener.wrote(stage, text)
            if refiner:
                refiner(text, tokens)

        return on_text


def _instructed(prompt: Prompt, instructions: str) -> Prompt:
    """The prompt with these instructions after its own."""
    if not instructions:
        return prompt

    def with_instructions(question: str, found: Sequence[Retrieved]) -> Sequence[Message]:
        first, *others = prompt(question, found)
        if first.role != "system":
            return [Message("system", instructions), first, *others]
        return [replace(first, content=f"{first.content}\n\n{instructions}"), *others]

    return with_instructions


async def fit(
    question: str,
    found: Sequence[Retrieved],
    prompt: Prompt,
    room: int,
    count_tokens: Callable[[Sequence[Message]], Awaitable[int]],
) -> tuple[Sequence[Message], int]:
    """The prompt with as many of the best passages as fit.

    ``found`` is best first, and the prompt has ``room`` tokens. Returns the prompt and how many passages it holds.

    Raises:
        ContextError: not even the question fits.
    """
    messages = prompt(question, found)
    if await count_tokens(messages) <= room:
        return messages, len(found)
    alone = prompt(question, ())
    if (tokens := await count_tokens(alone)) > room:  # before all else: every count of a long question takes long
        raise ContextError(
            f"The question takes {tokens:,} tokens and the context has room for {room:,}.",
            remedy="Shorten it, lower --max-tokens or raise --ctx-size.",
        )
    for kept in range(len(found) - 1, 0, -1):
        messages = prompt(question, found[:kept])
        if await count_tokens(messages) <= room:
            return messages, kept
    return alone, 0
