"""Ties an LLM, an embedder and a retriever together and answers questions with a pipeline."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from telerag_cli.config import Lookahead, Metric
from telerag_cli.engine.citations import Citation, cite
from telerag_cli.engine.prompt import fit
from telerag_cli.engine.refiner import Refiner
from telerag_cli.generation.base import Generation, Generator, Message, OnText, Request
from telerag_cli.index.artifact import FloatArray
from telerag_cli.index.passages import Passages
from telerag_cli.lookahead.order import PATIENT_CHECKPOINTS, blend, due
from telerag_cli.lookahead.retriever import Found, JoinReport, Retriever
from telerag_cli.lookahead.round import Round
from telerag_cli.pipelines.base import Ahead, Pipeline, Retrieved
from telerag_cli.processor import give_way
from telerag_cli.tracing import Tracer

LLM = "LLM"
EMBED = "embed"
BACKGROUND_NICENESS = 5


class QueryEmbedder(Protocol):
    """Embeds questions the way the index's passages were embedded."""

    def encode_queries(self, texts: Sequence[str]) -> FloatArray:
        """Shape (len(texts), dimension); may be called from several threads."""

    def sketch(self, text: str) -> FloatArray:
        """A rough embedding, shape (dimension,), that takes little from an LLM decoding meanwhile."""


@dataclass(frozen=True)
class Settings:
    """How questions are answered."""

    k: int
    nprobe: int
    lookahead: Lookahead
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """One LLM call: its name, its text and what it took."""

    name: str
    generation: Generation


@dataclass(frozen=True)
class Answered:
    """An answer and how it came about. Times are seconds; ``timings`` maps each stage to its own."""

    answer: str
    found: list[Retrieved]
    citations: list[Citation]
    stages: list[Stage]
    joins: list[JoinReport]
    dropped_passages: int
    """Retrieved passages that did not fit the context, lowest rank first."""
    timings: dict[str, float]


class Engine:
    """Long-lived: the models, the index and its fast tier. One question is answered at a time."""

    def __init__(self, generator: Generator, embedder: QueryEmbedder, retriever: Retriever, passages: Passages, settings: Settings,
                 *, tracer: Tracer | None = None) -> None:  # fmt: skip
        retriever.check(settings.k, settings.nprobe)
        self.generator = generator
        self.embedder = embedder
        self.retriever = retriever
        self.passages = passages
        self.settings = settings
        self.tracer = tracer or Tracer(enabled=False)
        # One thread, so that what is begun is there before it is refined; a polite one, because the LLM needs the cores.
        self.background = ThreadPoolExecutor(
            1, "refine", initializer=give_way, initargs=(BACKGROUND_NICENESS,)
        )
        self._lengths: dict[str, float] = {}

    async def ask(self, pipeline: Pipeline, question: str) -> Answered:
        """Answer one question.

        Raises:
            TeleragError: it does not fit the context, or a model or the index failed.
        """
        session = _Session(self)
        started_s = time.perf_counter()
        try:
            answer = await pipeline(session, question)
        finally:
            await session.end()
        session.timings["total_s"] = time.perf_counter() - started_s
        return Answered(answer, session.found, cite(answer, session.found), session.stages, session.joins, session.dropped,
                        dict(session.timings))  # fmt: skip

    def expected_tokens(self, stage: str, max_tokens: int) -> float:
        """How long a stage's text will probably be: what it was on average, or at first all it may be."""
        return min(self._lengths.get(stage, float(max_tokens)), float(max_tokens))

    def observe(self, stage: str, tokens: int) -> None:
        """Keep a moving average of a stage's length, in which the last answer weighs a quarter."""
        known = self._lengths.get(stage)
        self._lengths[stage] = tokens if known is None else 0.75 * known + 0.25 * tokens

    def close(self) -> None:
        """Free the models and the arena."""
        self.background.shutdown()
        self.generator.close()
        self.retriever.tier.close()


@dataclass(frozen=True)
class _Ahead(Ahead):
    """Lookahead of one session that is on: the embedding it begins with, shape (dimension,), and its round.

    Both are made while the LLM already reads its prompt.
    """

    begun: Future[tuple[FloatArray, Round]]


@dataclass
class _Session:
    """What one question has used so far; the `Rag` that its pipeline sees."""

    engine: Engine
    found: list[Retrieved] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    joins: list[JoinReport] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    dropped: int = 0
    begun: list[Future[tuple[FloatArray, Round]]] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def lookahead(self, query: str) -> AsyncIterator[Ahead]:
        """See `Rag`. It goes on after the block, until the retrieval, and ends with the session at the latest."""
        engine = self.engine
        if engine.settings.lookahead is Lookahead.OFF:
            yield Ahead()
            return

        def begin() -> tuple[FloatArray, Round]:
            vector = self._sketch(query)
            refining = engine.settings.lookahead is Lookahead.REFINED
            return vector, engine.retriever.begin(vector[None], engine.settings.nprobe, refining=refining)

        self.begun.append(engine.background.submit(begin))
        yield _Ahead(self.begun[-1])

    async def generate(
        self, stage: str, messages: Sequence[Message], *, max_tokens: int, refining: Ahead | None = None
    ) -> str:
        """See `Rag`."""
        refiner = self._refiner(stage, max_tokens, refining)
        text = await self._write(stage, messages, max_tokens, refiner.on_text if refiner else None)
        if refiner:
            refiner.end()
        return text

    async def retrieve(self, queries: Sequence[str], ahead: Ahead | None = None) -> list[Retrieved]:
        """See `Rag`."""
        settings = self.engine.settings
        started_s = time.perf_counter()
        vectors = await asyncio.to_thread(self._embed, queries)
        embedded_s = time.perf_counter()
        round_ = (await asyncio.wrap_future(ahead.begun))[1] if isinstance(ahead, _Ahead) else None
        search = self.engine.retriever.search
        found = await asyncio.to_thread(search, vectors, settings.k, settings.nprobe, round_)
        self.joins.append(found.report)
        hits = await asyncio.to_thread(self._fetch, found)
        ended_s = time.perf_counter()
        self.timings["embed_s"] += embedded_s - started_s
        self.timings["join_s"] += found.report.join_s
        self.timings["retrieval_s"] += ended_s - started_s
        self.found = hits
        return hits

    async def answer(self, question: str, found: Sequence[Retrieved]) -> str:
        """See `Rag`."""
        settings = self.engine.settings
        room = self.engine.generator.context_tokens - settings.max_tokens
        prompt, kept = fit(question, found, room, self.engine.generator.count_tokens)
        self.dropped += len(found) - kept
        return await self._write("answer", prompt, settings.max_tokens, None)

    async def end(self) -> None:
        """Stop lookahead that nothing retrieved from."""
        for begun in self.begun:
            _vector, round_ = await asyncio.wrap_future(begun)
            round_.stop()

    async def _write(
        self, stage: str, messages: Sequence[Message], max_tokens: int, on_text: OnText | None
    ) -> str:
        engine = self.engine
        settings = engine.settings
        request = Request(messages, max_tokens, settings.temperature, settings.top_p, settings.seed)
        started_s = time.perf_counter()
        generation = await engine.generator.generate(request, on_text)
        ended_s = time.perf_counter()
        tokens = {
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.completion_tokens,
        }
        engine.tracer.add(LLM, stage, started_s, ended_s, **tokens)
        engine.observe(stage, generation.completion_tokens)
        self.timings[f"{stage}_s"] += ended_s - started_s
        self.timings["llm_s"] += ended_s - started_s
        self.stages.append(Stage(stage, generation))
        return generation.text

    def _refiner(self, stage: str, max_tokens: int, ahead: Ahead | None) -> Refiner | None:
        engine = self.engine
        if engine.settings.lookahead is not Lookahead.REFINED or not isinstance(ahead, _Ahead):
            return None
        begun, before = ahead.begun, 0.0

        def refine(text: str, fraction: float) -> None:
            nonlocal before
            question, ahead = begun.result()
            if ahead.idle and not due(fraction, before, PATIENT_CHECKPOINTS):
                return
            before = fraction
            mixed = blend(question, self._sketch(text), fraction)
            engine.retriever.refine(ahead, mixed[None], engine.settings.nprobe, fraction)

        return Refiner(refine, engine.expected_tokens(stage, max_tokens), engine.background)

    def _embed(self, texts: Sequence[str]) -> FloatArray:
        with self.engine.tracer.span(EMBED, f"{len(texts)} texts" if len(texts) > 1 else "text"):
            return self.engine.embedder.encode_queries(texts)

    def _sketch(self, text: str) -> FloatArray:
        with self.engine.tracer.span(EMBED, "sketch"):
            return self.engine.embedder.sketch(text)

    def _fetch(self, found: Found) -> list[Retrieved]:
        """The best ``k`` passages over all queries, each once, best first."""
        larger_is_nearer = self.engine.retriever.index.manifest.metric is Metric.IP
        best: dict[int, float] = {}
        for score, row in zip(found.scores.ravel().tolist(), found.rows.ravel().tolist(), strict=True):
            if row >= 0 and (row not in best or (score > best[row]) == larger_is_nearer):
                best[row] = score
        ranked = sorted(best.items(), key=lambda item: (-item[1] if larger_is_nearer else item[1], item[0]))[
            : self.engine.settings.k
        ]
        passages = self.engine.passages[[row for row, _score in ranked]]
        return [
            Retrieved(passage, row, score) for passage, (row, score) in zip(passages, ranked, strict=True)
        ]
