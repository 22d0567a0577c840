"""Recording: what pipelines asked for and when, turned into what simulated replicas are asked for."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from statistics import mean, median

import numpy as np

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.bench.simulating.work import Ahead, Call, Follow, Lookup, Question, Text
from telerag_cli.config import Lookahead
from telerag_cli.engine.refiner import AWAITED
from telerag_cli.engine.retrieval import QueryEmbedder
from telerag_cli.engine.scheduler import LOOKED_DOWN
from telerag_cli.engine.session import Session
from telerag_cli.llm.base import Generation, Message
from telerag_cli.llm.shapes import Shape
from telerag_cli.pipelines import base
from telerag_cli.pipelines.base import Expect, Pipeline, Prompt, Rag
from telerag_cli.pipelines.found import Answer, Retrieved
from telerag_cli.pipelines.prompts import answer_prompt
from telerag_cli.prefetch.order import CHECKPOINTS, blend, prefetch_depth
from telerag_cli.retrieval.retriever import Retriever

Order = Callable[[FloatArray], IntArray]


@dataclass(frozen=True)
class Began:
    """Lookahead for a query."""

    at_s: float
    query: str


@dataclass(frozen=True)
class Wrote:
    """A text."""

    from_s: float
    to_s: float
    stage: str
    generation: Generation
    expect: Expect | None
    """What it leads to while it is written; None if lookahead did not follow it."""


@dataclass(frozen=True)
class Searched:
    """A retrieval."""

    from_s: float
    to_s: float
    queries: tuple[str, ...]


@dataclass
class Noted:
    """All that one question asked for; seconds of ``time.perf_counter``."""

    question: str
    begun: list[Began] = field(default_factory=list)
    called: list[Wrote | Searched] = field(default_factory=list)


class Recorder:
    """Makes pipelines that say what they do."""

    def __init__(self) -> None:
        self.noted: list[Noted] = []
        """Of each question that was answered, in the order of their ends."""

    def over(self, pipeline: Pipeline) -> Pipeline:
        """The same pipeline, noted; for an engine's sessions."""

        async def noting(rag: Rag, question: str) -> Answer:
            assert isinstance(rag, Session)
            noted = Noted(question)
            answer = await pipeline.run(_Noting(rag, noted), question)
            self.noted.append(noted)
            return answer

        return replace(pipeline, run=noting)


class _Noting:
    """A `Rag` that passes everything on and notes it."""

    def __init__(self, session: Session, noted: Noted) -> None:
        self._session = session
        self._noted = noted

    @asynccontextmanager
    async def lookahead(self, query: str) -> AsyncIterator[base.Ahead]:
        """See `Rag`."""
        self._noted.begun.append(Began(time.perf_counter(), query))
        async with self._session.lookahead(query) as ahead:
            yield ahead

    async def generate(
        self,
        stage: str,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        stop: tuple[str, ...] = (),
        shape: Shape | None = None,
        logprobs: bool = False,
        refining: base.Ahead | None = None,
        expect: Expect | None = None,
    ) -> Generation:
        """See `Rag`."""
        from_s = time.perf_counter()
        generation = await self._session.generate(
            stage,
            messages,
            max_tokens=max_tokens,
            stop=stop,
            shape=shape,
            logprobs=logprobs,
            refining=refining,
            expect=expect,
        )
        self._wrote(from_s, refining, expect)
        return generation

    async def retrieve(self, queries: Sequence[str], ahead: base.Ahead | None = None) -> list[Retrieved]:
        """See `Rag`."""
        from_s = time.perf_counter()
        found = await self._session.retrieve(queries, ahead)
        self._noted.called.append(Searched(from_s, time.perf_counter(), tuple(queries)))
        return found

    async def answer(
        self,
        question: str,
        found: Sequence[Retrieved],
        *,
        stage: str = "answer",
        prompt: Prompt = answer_prompt,
        max_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        refining: base.Ahead | None = None,
        expect: Expect | None = None,
    ) -> Answer:
        """See `Rag`."""
        from_s = time.perf_counter()
        answer = await self._session.answer(
            question,
            found,
            stage=stage,
            prompt=prompt,
            max_tokens=max_tokens,
            stop=stop,
            refining=refining,
            expect=expect,
        )
        self._wrote(from_s, refining, expect)
        return answer

    def _wrote(self, from_s: float, refining: base.Ahead | None, expect: Expect | None) -> None:
        # A session notes a stage and returns, so the last of its stages is this one's.
        stage = self._session.stages[-1]
        follows = None if refining is None else expect or (lambda text: [text])
        self._noted.called.append(Wrote(from_s, time.perf_counter(), stage.name, stage.generation, follows))


class Translator:
    """From what was noted to what is simulated."""

    def __init__(
        self, embedder: QueryEmbedder, retriever: Retriever, nprobe: int, lookahead: Lookahead, noted: Sequence[Noted]
    ) -> None:
        """Look at all of it first: lengths of texts are expected as they are on average.

        Args:
            embedder: embeds what lookahead follows, and queries.
            retriever: knows the lists.
            nprobe: lists probed per query.
            lookahead: what lookahead is to follow.
            noted: all questions.
        """
        self._embedder = embedder
        self._retriever = retriever
        self._nprobe = nprobe
        self._lookahead = lookahead
        texts = [call for each in noted for call in each.called if isinstance(call, Wrote)]
        by_stage: dict[str, list[Generation]] = {}
        for text in texts:
            by_stage.setdefault(text.stage, []).append(text.generation)
        self._expected = {stage: mean(each.completion_tokens for each in some) for stage, some in by_stage.items()}
        # What most prompts of a stage could take over from others is how they begin.
        known = {stage: [each.cached_tokens for each in some if each.cached_tokens] for stage, some in by_stage.items()}
        self._common = {stage: round(median(some)) if some else 0 for stage, some in known.items()}

    def question(self, number: int, noted: Noted) -> Question:
        """One question."""
        vector = self._embedder.encode_queries([noted.question])[0]
        nlist = self._retriever.tier.nlist
        ranked = self._retriever.nearest(vector[None], min(LOOKED_DOWN * self._nprobe, nlist))[0]
        likely = np.zeros(nlist, np.bool_)
        likely[ranked[: self._nprobe]] = True
        steps: list[Ahead | tuple[Call, ...]] = []
        begun = sorted(noted.begun, key=lambda each: each.at_s) if self._lookahead is not Lookahead.OFF else []
        latest = vector
        for calls in _together(noted.called):
            while begun and begun[0].at_s <= calls[0].from_s:
                first = begun.pop(0)
                own = first.query == noted.question
                latest = vector if own else self._embedder.embed_approx([first.query])[0]
                refining = self._lookahead is Lookahead.REFINED
                steps.append(Ahead(self._order([latest]), prefetch_depth(self._nprobe, 0.0, refining=refining), own))
            steps.append(tuple(self._call(call, latest) for call in calls))
        return Question(number, ranked, likely, tuple(steps))

    def _call(self, call: Wrote | Searched, began_with: FloatArray) -> Call:
        if isinstance(call, Searched):
            return Lookup(tuple(self._retriever.nearest(self._embedder.encode_queries(call.queries), self._nprobe)))
        made = call.generation
        # A text that ends by itself ends with a token that is none of it.
        picks = made.completion_tokens + (made.finish_reason == "stop" and made.stopped_by is None)
        follows = self._follows(call, began_with) if call.expect and self._lookahead is Lookahead.REFINED else ()
        return Text(call.stage, max(made.prompt_tokens, 1), self._common[call.stage], max(picks, 1), follows)

    def _follows(self, text: Wrote, began_with: FloatArray) -> tuple[Follow, ...]:
        """What lookahead follows at each checkpoint that the text reached."""
        assert text.expect is not None
        written, tokens = text.generation.text, max(text.generation.completion_tokens, 1)
        expected = max(self._expected[text.stage], 1.0)
        follows = []
        for checkpoint in CHECKPOINTS:
            at_tokens = math.ceil(checkpoint * expected)
            if at_tokens >= tokens:
                break
            queries = text.expect(written[: len(written) * at_tokens // tokens])
            fraction = min(at_tokens / expected, 1.0)
            if queries:
                mixed = [blend(began_with, vector, fraction) for vector in self._embedder.embed_approx(queries)]
                order, likely = self._order(mixed), len(mixed) * self._nprobe
            else:
                order, likely = self._order([began_with]), AWAITED * self._nprobe
            follows.append(Follow(at_tokens, fraction, order, prefetch_depth(likely, fraction, refining=True)))
        return tuple(follows)

    def _order(self, vectors: Sequence[FloatArray]) -> IntArray:
        return self._retriever.order(np.stack(vectors))


def _together(called: Sequence[Wrote | Searched]) -> list[list[Wrote | Searched]]:
    """Calls in the order in which they began; those that overlap are of one step."""
    steps: list[list[Wrote | Searched]] = []
    until_s = -math.inf
    for call in sorted(called, key=lambda each: each.from_s):
        if call.from_s >= until_s:
            steps.append([])
        steps[-1].append(call)
        until_s = max(until_s, call.to_s)
    return steps
