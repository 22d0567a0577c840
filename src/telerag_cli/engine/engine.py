"""Ties an LLM, an embedder and a retriever together and answers questions with a pipeline, many at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from telerag_cli.arrays import FloatArray
from telerag_cli.config import Lookahead
from telerag_cli.engine.citations import Citation, cite
from telerag_cli.engine.forecast import Forecast, Prediction
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.engine.refinement_embedder import RefinementEmbedder
from telerag_cli.engine.retrieval import Finder, QueryEmbedder, Retrieval, Retrievals
from telerag_cli.engine.session import Session, Settings, Shared, Stage, Writing
from telerag_cli.index.passages import Passages
from telerag_cli.llm.base import FinishReason, Generator, find_stop
from telerag_cli.pipelines.base import Listener, Pipeline
from telerag_cli.pipelines.conversation import REWRITE_TOKENS, Turn, recalled, rewrite
from telerag_cli.pipelines.found import Retrieved
from telerag_cli.planning.averages import Averages
from telerag_cli.planning.planner import Planner
from telerag_cli.retrieval.report import JoinReport
from telerag_cli.retrieval.retriever import Retriever, check_search
from telerag_cli.tracing import Tracer

SKETCH = "sketch"


@dataclass(frozen=True)
class Answered:
    """An answer and how it came about. Times are seconds; ``timings`` maps each stage to its own."""

    question: str
    """What was answered: the question that was asked, or what it meant in its conversation."""
    pipeline: str
    """The name of the one that answered."""
    lookahead: Lookahead
    answer: str
    found: list[Retrieved]
    """The passages it was written from, in the order of their numbers."""
    citations: list[Citation]
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


class Engine:
    """Long-lived: the models, the index and its fast tier. Any number of questions may be under way in one event loop."""

    def __init__(
        self,
        generator: Generator,
        embedder: QueryEmbedder,
        retriever: Retriever,
        passages: Passages,
        settings: Settings,
        *,
        averages: Averages | None = None,
        planner: Planner | None = None,
        finder: Finder | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Put together what is open.

        Args:
            generator: the LLM.
            embedder: embeds what lookahead follows, and queries.
            retriever: the index and its fast tier.
            passages: of the index.
            settings: how to answer.
            averages: what earlier runs showed.
            planner: predicts, if there is a profile.
            finder: finds passages when the query is there; by default the retriever, over the passages.
            tracer: where work is recorded.

        Raises:
            UsageError: the index cannot be searched so.
        """
        check_search(retriever.index, settings.k, settings.nprobe)
        self.tracer = tracer or Tracer(enabled=False)
        self.embedder = embedder
        retrievals = finder or Retrievals(embedder, retriever, passages, settings.k, settings.nprobe, self.tracer)
        self.shared = Shared(
            generator,
            retriever,
            retrievals,
            RefinementEmbedder(self._embed_approx),
            settings,
            averages or Averages(),
            planner,
            Writing(),
            self.tracer,
        )

    @property
    def settings(self) -> Settings:
        """How questions are answered."""
        return self.shared.settings

    @property
    def retriever(self) -> Retriever:
        """The index and its fast tier."""
        return self.shared.retriever

    @property
    def generator(self) -> Generator:
        """The LLM."""
        return self.shared.generator

    def set_lookahead(self, mode: Lookahead) -> None:
        """Choose what predicts the lists to move, from the next question on."""
        self.shared = replace(self.shared, settings=replace(self.shared.settings, lookahead=mode))

    async def ask(
        self,
        pipeline: Pipeline,
        question: str,
        listener: Listener | None = None,
        *,
        turns: Sequence[Turn] = (),
        batch: MicroBatch | None = None,
        settings: Settings | None = None,
    ) -> Answered:
        """Answer one question.

        Args:
            pipeline: how.
            question: the question.
            listener: hears what happens, as it happens.
            turns: the conversation before it, which the question may lean on.
            batch: the questions that it is answered together with, itself included.
            settings: how to answer this one; ``k`` and ``nprobe`` stay the engine's.

        Raises:
            TeleragError: it does not fit the context, or a model or the index failed.
        """
        forecast = Forecast(self.shared.averages, self.shared.planner, pipeline.name)
        shared = replace(self.shared, settings=settings) if settings else self.shared
        generator = shared.generator
        known = recalled(turns, question, generator.context_tokens - REWRITE_TOKENS, generator.count_tokens)
        started_s = time.perf_counter()
        with batch or MicroBatch((question,)) as together, Session(shared, forecast, together, listener) as session:
            standalone = await rewrite(session, known, question)
            if listener and standalone != question:
                listener.rewritten(standalone)
            answer = await pipeline.run(session, standalone)
        session.timings["total_s"] = time.perf_counter() - started_s
        text = _before_stop(answer.text, shared.settings.stop)
        return Answered(
            standalone,
            pipeline.name,
            shared.settings.lookahead,
            text,
            list(answer.found),
            cite(text, answer.found),
            session.stages,
            session.retrievals,
            session.plans,
            session.dropped,
            dict(session.timings),
        )

    def forget(self) -> None:
        """Drop what is kept of earlier prompts and lists, save what is in use: for a question whose times are to be compared."""
        self.shared.generator.forget()
        self.shared.retriever.tier.forget()

    def release(self) -> None:
        """End what belongs to this engine alone; models, index and arena stay open for others."""
        self.shared.refinement_embedder.close()
        self.shared.retrievals.close()

    def close(self) -> None:
        """Free the models and the arena."""
        self.release()
        self.shared.generator.close()
        self.shared.retriever.close()

    def _embed_approx(self, texts: Sequence[str]) -> FloatArray:
        with self.tracer.span(SKETCH, f"{len(texts)} texts" if len(texts) > 1 else "text"):
            return self.embedder.embed_approx(texts)


def _before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to a stop: a pipeline may put an answer together from texts of which none held it."""
    found = find_stop(text, stop)
    return text[: found[0]].rstrip() if found else text
