"""Opening an index with all that answers from it, the same way for every command: planned, shown, then taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from telerag_cli.cli import console
from telerag_cli.config import Lookahead

if TYPE_CHECKING:
    from telerag_cli.engine.assemble import Opened
    from telerag_cli.engine.engine import Engine
    from telerag_cli.engine.llm_plan import LlmOptions, PlannedLlm
    from telerag_cli.engine.session import Settings
    from telerag_cli.engine.tier_plan import PlannedTier, TierOptions
    from telerag_cli.llm.base import Generator
    from telerag_cli.pipelines.base import Pipeline
    from telerag_cli.planning.profile import Identity
    from telerag_cli.retrieval.retriever import Retriever
    from telerag_cli.tracing import Tracer

Warn = Callable[[str], None]
AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Searching:
    """What a user said about where and how to search; None for what the index suggests."""

    index: Path
    embedder: str | None
    tier: TierOptions
    k: int | None
    nprobe: int | None
    rescore: int | None = None


@dataclass(frozen=True)
class Answering:
    """What a user said about the LLM and its answers."""

    llm: LlmOptions
    concurrency: int | None
    lookahead: Lookahead
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def settings(self, k: int, nprobe: int) -> Settings:
        """As an engine takes it."""
        from telerag_cli.engine.session import Settings

        return Settings(k, nprobe, self.lookahead, self.max_tokens, self.temperature, self.top_p, self.seed)


@dataclass(frozen=True)
class Planned:
    """What a user said about the plan."""

    profile: str = AUTO
    prefetch_budget: str | None = None
    explain: bool = False
    pipeline: Pipeline | None = None


@dataclass(frozen=True)
class Prepared:
    """An index with its embedder, and what else answering takes: planned and shown, not taken."""

    opened: Opened
    tier: PlannedTier
    llm: PlannedLlm | None
    k: int
    nprobe: int


def prepare(
    searching: Searching,
    llm: LlmOptions | None,
    concurrency: int | None = None,
    warn: Warn = console.warn,
    opened: Opened | None = None,
) -> Prepared:
    """Open index, passages and embedder, plan the rest, and show the memory of all.

    Args:
        searching: where and how to search.
        llm: which LLM, if one is needed.
        concurrency: questions at once; None for as many as memory holds contexts for.
        warn: takes what a user should know.
        opened: index, passages and embedder, if they are open already.

    Raises:
        TeleragError: something is missing, does not fit, or contradicts something else.
    """
    from telerag_cli.engine.assemble import byte_plan, default_k, default_nprobe, open_index
    from telerag_cli.engine.llm_plan import plan_llm
    from telerag_cli.engine.tier_plan import plan_tier
    from telerag_cli.index.artifact import Index
    from telerag_cli.retrieval.retriever import check_search

    index = opened.index if opened else Index.open(searching.index)
    k, nprobe = searching.k or default_k(index), searching.nprobe or default_nprobe(index)
    check_search(index, k, nprobe)
    tier = plan_tier(index, searching.tier)
    planned = plan_llm(llm, concurrency, tier, warn, searching.tier.device) if llm else None
    opened = opened or open_index(index, searching.embedder, searching.tier.device)
    rows = byte_plan(tier, planned.rows if planned else [])
    console.table(f"Memory ({tier.kind} tier: {tier.why})", ("what", "where", "size"), rows)
    return Prepared(opened, tier, planned, k, nprobe)


@contextlib.contextmanager
def open_search(searching: Searching) -> Iterator[tuple[Opened, Retriever, int, int]]:
    """An index ready for searches, and the ``k`` and ``nprobe`` to search with; closed at the end."""
    from telerag_cli.engine.assemble import open_retriever

    made = prepare(searching, None)
    retriever = open_retriever(made.opened.index, made.tier, rescore=searching.rescore, progress=console.progress)
    with contextlib.closing(retriever):
        for note in retriever.tier.notes:
            console.warn(note)
        yield made.opened, retriever, made.k, made.nprobe


@dataclass(frozen=True)
class Parts:
    """All that answering needs, not put together: to be measured."""

    opened: Opened
    tier: PlannedTier
    retriever: Retriever
    generator: Generator
    nprobe: int
    identity: Identity
    versions: dict[str, str]


@contextlib.contextmanager
def open_parts(
    searching: Searching, llm: LlmOptions, concurrency: int | None, warn: Warn = console.warn
) -> Iterator[Parts]:
    """The parts of an engine, ready; closed at the end."""
    from telerag_cli.engine.assemble import open_retriever
    from telerag_cli.engine.survey import embedder_name, identity_of

    made = prepare(searching, llm, concurrency, warn)
    assert made.llm
    opened, tier = made.opened, made.tier
    opened.embedder.warm_up(approximate=True)
    identity, versions = identity_of(opened.index, tier.name, made.llm, embedder_name(opened.embedder))
    with (
        contextlib.closing(made.llm.open()) as generator,
        contextlib.closing(open_retriever(opened.index, tier, progress=console.progress)) as retriever,
    ):
        yield Parts(opened, tier, retriever, generator, made.nprobe, identity, versions)


@contextlib.contextmanager
def open_answering(
    searching: Searching,
    answering: Answering,
    tracer: Tracer,
    warn: Warn = console.warn,
    opened: Opened | None = None,
    planned: Planned = Planned(NONE),
) -> Iterator[tuple[Engine, int]]:
    """An engine ready for questions, and how many to ask at once; closed at the end.

    Args:
        searching: where and how to search.
        answering: what answers.
        tracer: where work is recorded.
        warn: takes what a user should know.
        opened: index, passages and embedder, if they are open already.
        planned: the profile to plan with, and whether to tell what comes of it.
    """
    from telerag_cli.cli.planning import plan_with
    from telerag_cli.engine.assemble import open_engine

    made = prepare(searching, answering.llm, answering.concurrency, warn, opened)
    assert made.llm
    settings = answering.settings(made.k, made.nprobe)
    planning = plan_with(planned, made.opened, made.tier, made.llm, settings.nprobe, warn)
    engine = open_engine(
        made.opened,
        made.llm.open,
        made.tier,
        settings,
        rescore=searching.rescore,
        planning=planning,
        tracer=tracer,
        progress=console.progress,
    )
    with contextlib.closing(engine):
        if planned.explain and planned.pipeline:
            show_plan(engine, planned.pipeline)
        for note in engine.retriever.tier.notes:
            warn(note)
        try:
            yield engine, made.llm.concurrency
        finally:
            engine.shared.averages.save()


def show_plan(engine: Engine, pipeline: Pipeline) -> None:
    """What is expected of a run; nothing without a profile."""
    from telerag_cli.engine.explain import explain

    if engine.shared.planner is None:
        console.warn("There is no profile to explain a plan with.")
        return
    rows = explain(engine, engine.shared.planner, pipeline)
    console.table(f"Plan ({pipeline.name}, one question alone)", ("what", "expected", "why"), rows)
