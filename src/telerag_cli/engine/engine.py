"""The engine: an LLM, an embedder and a retriever that answer questions with a pipeline, many at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from telerag_cli.arrays import FloatArray
from telerag_cli.config import NONE, AnswerConfig, EngineConfig, Lookahead, ScheduleConfig
from telerag_cli.corpus.passages import Retrieved
from telerag_cli.engine.citations import CitedSpan, cite
from telerag_cli.engine.forecast import Forecast, Prediction
from telerag_cli.engine.loop_thread import LoopThread
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.engine.opening import (
    SILENT,
    OpenedIndex,
    Reporter,
    SearchOnly,
    kept_plan,
    measured,
    open_retriever,
    prepare,
    rates_for_joins,
)
from telerag_cli.engine.questions import usable
from telerag_cli.engine.refinement import RefinementEmbedder
from telerag_cli.engine.session import Session, Shared, Stage, Writing
from telerag_cli.errors import TeleragError, UsageError
from telerag_cli.index.passages import Passages
from telerag_cli.llm.base import FinishReason, Generator, find_stop
from telerag_cli.pipelines.base import Listener, Pipeline
from telerag_cli.pipelines.conversation import Turn, recent_turns, rewrite
from telerag_cli.pipelines.registry import make_pipeline
from telerag_cli.planning.averages import Averages
from telerag_cli.planning.planner import Planner
from telerag_cli.retrieval.report import JoinReport
from telerag_cli.retrieval.retriever import Finder, QueryEmbedder, Retrieval, Retrievals, Retriever, search_depth
from telerag_cli.system import spin_at_barriers
from telerag_cli.tracing import Tracer

SKETCH = "sketch"
ANSWER_FIELDS = {each.name for each in fields(AnswerConfig)}


@dataclass(frozen=True)
class AskResult:
    """An answer and how it came about. Times are seconds; ``timings`` maps each stage to its own."""

    question: str
    """What was answered: the question that was asked, or what it meant in its conversation."""
    pipeline: str
    """The name of the one that answered."""
    lookahead: Lookahead
    answer: str
    found: list[Retrieved]
    """The passages it was written from, in the order of their numbers."""
    citations: list[CitedSpan]
    stages: list[Stage]
    retrievals: list[Retrieval]
    plans: list[Prediction]
    """Of the retrievals that lookahead prepared; none without a profile."""
    dropped_passages: int
    """Retrieved passages that did not fit a prompt, lowest rank first."""
    timings: dict[str, float]

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer ended; ``length`` if it is a text that was cut."""
        cut = any(
            stage.generation.text == self.answer and stage.generation.finish_reason == "length" for stage in self.stages
        )
        return "length" if cut else "stop"

    @property
    def joins(self) -> list[JoinReport]:
        """What each retrieval found in fast memory."""
        return [retrieval.join for retrieval in self.retrievals]


@dataclass(frozen=True)
class Delta:
    """A piece of a text as it is written."""

    stage: str
    """The stage that writes; ``answer`` for the answer itself."""
    text: str


class News(Listener):
    """What the stages of one question write, as pieces."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[str, str] | None] = asyncio.Queue()

    def wrote(self, stage: str, text: str) -> None:
        """See `Listener`."""
        self._loop.call_soon_threadsafe(self._news.put_nowait, (stage, text))

    def end(self) -> None:
        """Nothing more will be written."""
        self._loop.call_soon(self._news.put_nowait, None)

    async def deltas(self) -> AsyncIterator[Delta]:
        """The pieces, until the end."""
        written: dict[str, int] = {}
        while (item := await self._news.get()) is not None:
            stage, text = item
            if len(text) > written.get(stage, 0):
                yield Delta(stage, text[written.get(stage, 0) :])
                written[stage] = len(text)


class Engine:
    """Models, index and fast tier, opened once for any number of questions; a context manager.

    The methods whose names begin with ``a`` are for an event loop, one loop for all of them. The others run those in a
    thread of the engine's own, for programs without a loop.
    """

    def __init__(
        self,
        generator: Generator,
        embedder: QueryEmbedder,
        retriever: Retriever,
        passages: Passages,
        config: EngineConfig,
        *,
        averages: Averages | None = None,
        planner: Planner | None = None,
        finder: Finder | None = None,
        tracer: Tracer | None = None,
        concurrency: int = 1,
    ) -> None:
        """Put together what is open; see `open`. ``concurrency`` questions are answered at once.

        Raises:
            UsageError: the index cannot be searched so.
        """
        self.k, self.nprobe = search_depth(retriever.index, config)
        self.config = config
        self.pipeline = make_pipeline(config.pipeline, **config.pipeline_options)
        self.concurrency = concurrency
        self.tier_name = ""
        """Kind and device of the fast tier, by which a profile knows it."""
        self.tracer = tracer or Tracer(enabled=False)
        self.embedder = embedder
        self._loop: LoopThread | None = None
        self.shared = Shared(
            generator,
            retriever,
            finder or Retrievals(embedder, retriever, passages, self.k, self.nprobe, self.tracer),
            RefinementEmbedder(self._embed_approx),
            config,
            self.nprobe,
            averages or Averages(),
            planner,
            Writing(),
            self.tracer,
        )

    @classmethod
    def open(
        cls,
        config: EngineConfig,
        *,
        reporter: Reporter = SILENT,
        tracer: Tracer | None = None,
        opened: OpenedIndex | None = None,
        generator: Generator | None = None,
        finder: Finder | None = None,
        retriever: Retriever | None = None,
        sharers: int = 1,
        generate: bool = True,
    ) -> Self:
        """Open an engine: index, embedder, LLM and fast tier, ready for the first question. Close it, or use ``with``.

        Parts that are open already can be given: ``opened``, which stays the caller's; the LLM, which `release` leaves
        open and `close` does not; a ``finder`` in the retriever's place, for baselines; and, with ``opened``, a
        retriever. ``sharers`` processes share this machine's memory alike, this one included. Without ``generate`` no
        LLM is opened, and the engine only searches.

        Raises:
            UsageError: settings contradict each other or the index.
            ArtifactError: the index is missing or damaged.
            ModelError: a model is missing or does not fit the index.
            ResourceError: memory or a device is missing.
        """
        spin_at_barriers()
        if retriever is not None:
            assert opened, "who has the retriever has the index"
            parts = generator or SearchOnly(), opened.embedder, retriever, opened.passages
            return cls(*parts, config, finder=finder, tracer=tracer)
        made = prepare(config, reporter, opened=opened, sharers=sharers, generate=generate and generator is None)
        averages, known, planner = None, None, None
        if generate and config.profile != NONE:
            averages, known = kept_plan(config, made, reporter)
        made.opened.embedder.warm_up(approximate=generate and config.lookahead is not Lookahead.OFF)
        with contextlib.ExitStack() as undo:  # what was opened is closed if a part fails
            # The LLM comes before the arena, which on a GPU may take what is left.
            if generator is None and made.llm is not None:
                generator = made.llm.open()
                undo.callback(generator.close)
            rates = rates_for_joins(known) if known else None
            retriever = open_retriever(
                made.opened.index, made.tier, config, tracer=tracer, reporter=reporter, rates=rates
            )
            undo.callback(retriever.close)
            if averages is not None and generator is not None:
                profile = known or measured(config, made, generator, retriever, reporter)
                if profile is not None:
                    arena, most = retriever.tier.arena_bytes, config.prefetch_budget_bytes
                    planner = Planner(profile, averages, nprobe=made.nprobe, arena_bytes=arena, most_bytes=most)
            engine = cls(
                generator or SearchOnly(),
                made.opened.embedder,
                retriever,
                made.opened.passages,
                replace(config, k=made.k, nprobe=made.nprobe),
                averages=averages,
                planner=planner,
                finder=finder,
                tracer=tracer,
                concurrency=made.llm.concurrency if made.llm else 1,
            )
            undo.callback(engine.release)
            engine.tier_name = made.tier.name
            if config.explain:
                engine._show_plan(reporter)
            undo.pop_all()
        for note in retriever.tier.notes:
            reporter.warn(note)
        return engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def retriever(self) -> Retriever:
        """The index and its fast tier."""
        return self.shared.retriever

    @property
    def generator(self) -> Generator:
        """The LLM."""
        return self.shared.generator

    def configure(self, **settings: Any) -> None:
        """Change how questions are answered from the next one on: pipeline, its options, or fields of `AnswerConfig`.

        Raises:
            UsageError: a value is not one of its field, or the pipeline has no such option.
        """
        self.config = replace(self.config, **settings)
        self.pipeline = make_pipeline(self.config.pipeline, **self.config.pipeline_options)
        self.shared = replace(self.shared, config=self.config)

    def ask(self, question: str, **settings: Any) -> AskResult:
        """Answer one question; see `aask`."""
        return self._loop_thread.run(self.aask(question, settings=self.answer_config(**settings)))

    def ask_many(
        self, questions: Iterable[str], schedule: ScheduleConfig | None = None
    ) -> Iterator[AskResult | TeleragError]:
        """Answer many questions; see `aask_many`."""
        return self._loop_thread.iterate(self.aask_many(questions, schedule))

    def search(self, *queries: str) -> Retrieval:
        """Find passages; see `asearch`."""
        return self._loop_thread.run(self.asearch(*queries))

    def stream(self, question: str, **settings: Any) -> Iterator[Delta | AskResult]:
        """Answer one question piece by piece; see `astream`."""
        return self._loop_thread.iterate(self.astream(question, **settings))

    def answer_config(self, **settings: Any) -> AnswerConfig:
        """How to answer one question: the engine's settings with some of `AnswerConfig`'s fields changed.

        Raises:
            UsageError: a name or a value is not one of them.
        """
        for name in settings.keys() - ANSWER_FIELDS:
            raise UsageError(
                f"{name} cannot differ from question to question.",
                remedy=f"Give it to EngineConfig, or change one of {', '.join(sorted(ANSWER_FIELDS))}.",
            )
        return replace(self.config, **settings)

    async def asearch(self, *queries: str) -> Retrieval:
        """Find the best ``k`` passages for one query, or for several together.

        Raises:
            TeleragError: a list could not be read.
        """
        return await self.shared.retrievals.find([usable(query) for query in queries], [])

    async def astream(self, question: str, **settings: Any) -> AsyncIterator[Delta | AskResult]:
        """Answer one question; the texts of all stages come as they are written, and last the whole answer.

        ``settings`` are fields of `AnswerConfig` that differ for this question. See `aask` for the errors.
        """
        news = News()
        answering = asyncio.create_task(self.aask(question, listener=news, settings=self.answer_config(**settings)))
        answering.add_done_callback(lambda _task: news.end())
        try:
            async for delta in news.deltas():
                yield delta
            yield answering.result()
        finally:
            answering.cancel()
            await asyncio.wait([answering])

    async def aask_many(
        self, questions: Iterable[str], schedule: ScheduleConfig | None = None
    ) -> AsyncIterator[AskResult | TeleragError]:
        """Answer many questions, similar ones together; the answers come in the questions' order.

        They are read as they are needed, in a thread. One that cannot be answered yields its error, and costs the
        others nothing.
        """
        from telerag_cli.engine.admission import Local
        from telerag_cli.engine.batch import answer_each, in_order
        from telerag_cli.engine.questions import Question
        from telerag_cli.engine.scheduler import Scheduler, scheduled

        arena_bytes, index = self.retriever.tier.arena_bytes, self.retriever.index
        fitting = scheduled(schedule or ScheduleConfig(), self.concurrency, arena_bytes, index, self.nprobe)
        results: asyncio.Queue[AskResult | TeleragError | None] = asyncio.Queue()
        asked = (Question(str(number), text) for number, text in enumerate(questions, 1))
        answering = asyncio.create_task(
            answer_each(
                [Local(self, self.concurrency)],
                Scheduler.over(self, fitting),
                asked,
                in_order(lambda _place, _question, outcome: results.put_nowait(outcome)),
            )
        )
        answering.add_done_callback(lambda _task: results.put_nowait(None))
        try:
            while (outcome := await results.get()) is not None:
                yield outcome
            answering.result()
        finally:
            answering.cancel()
            await asyncio.wait([answering])

    async def aask(
        self,
        question: str,
        *,
        pipeline: Pipeline | None = None,
        listener: Listener | None = None,
        turns: Sequence[Turn] = (),
        batch: MicroBatch | None = None,
        settings: AnswerConfig | None = None,
    ) -> AskResult:
        """Answer one question.

        ``turns`` are the conversation before it, which the question may lean on, and ``batch`` the questions that it is
        answered together with, itself included. Without ``pipeline`` and ``settings`` it is answered as the engine was
        opened.

        Raises:
            TeleragError: it does not fit the context, or a model or the index failed.
        """
        question, pipeline = usable(question), pipeline or self.pipeline
        forecast = Forecast(self.shared.averages, self.shared.planner, pipeline.name)
        shared = replace(self.shared, config=settings) if settings else self.shared
        known = await recent_turns(turns, question, shared.generator)
        started_s = time.perf_counter()
        with batch or MicroBatch((question,)) as together, Session(shared, forecast, together, listener) as session:
            standalone = await rewrite(session, known, question)
            if listener and standalone != question:
                listener.rewritten(standalone)
            answer = await pipeline.run(session, standalone)
        session.timings["total_s"] = time.perf_counter() - started_s
        text = _before_stop(answer.text, shared.config.stop)
        return AskResult(
            standalone,
            pipeline.name,
            shared.config.lookahead,
            text,
            list(answer.found),
            cite(text, answer.found[: answer.in_prompt]),
            session.stages,
            session.retrievals,
            session.plans,
            session.dropped,
            dict(session.timings),
        )

    def forget(self) -> None:
        """Drop what is kept of earlier prompts and lists, not what is in use: before questions that are timed."""
        self.shared.generator.forget()
        self.shared.retriever.tier.forget()

    def release(self) -> None:
        """End what belongs to this engine alone; models, index and arena stay open for others."""
        if self._loop is not None:
            self._loop.close()
        self.shared.refinement_embedder.close()
        self.shared.retrievals.close()

    def close(self) -> None:
        """Keep what was learned, and free the models and the arena."""
        self.shared.averages.save()
        self.release()
        self.shared.generator.close()
        self.shared.retriever.close()

    @property
    def _loop_thread(self) -> LoopThread:
        if self._loop is None:
            self._loop = LoopThread()
        return self._loop

    def _show_plan(self, reporter: Reporter) -> None:
        from telerag_cli.engine.explain import explain

        planner = self.shared.planner
        if planner is None:
            reporter.warn("There is no profile to explain a plan with.")
            return
        title = f"Plan ({self.config.pipeline.value}, one question alone)"
        reporter.table(title, ("what", "expected", "why"), explain(self, planner, self.pipeline))

    def _embed_approx(self, texts: Sequence[str]) -> FloatArray:
        with self.tracer.span(SKETCH, f"{len(texts)} texts" if len(texts) > 1 else "text"):
            return self.embedder.embed_approx(texts)


def _before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to a stop: a pipeline may put an answer together from texts of which none held it."""
    found = find_stop(text, stop)
    return text[: found[0]].rstrip() if found else text
