"""Opening what searching and answering need, in the order that fails soonest: index, embedder, LLM, arena.

`Engine.open` is the only way in; commands, the server, benchmarks and replicas all come through `open_engine`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from telerag_cli.config import NONE, EngineConfig, GeneratorKind, Lookahead
from telerag_cli.engine.engine import Engine
from telerag_cli.engine.llm_plan import PlannedLlm, plan_llm
from telerag_cli.engine.opened_index import OpenedIndex, open_index, search_depth
from telerag_cli.engine.retrieval import Finder
from telerag_cli.engine.survey import embedder_name, identity_of, rates_for_joins, subject_of
from telerag_cli.engine.tier_plan import PlannedTier, Row, plan_tier
from telerag_cli.errors import ArtifactError, ResourceError, UsageError
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse
from telerag_cli.llm.base import Generation, Generator, Message, OnText, Request
from telerag_cli.planning.averages import Averages
from telerag_cli.planning.measure import measure
from telerag_cli.planning.planner import Planner
from telerag_cli.planning.profile import Identity, Profile, kept_in
from telerag_cli.progress import Advance, silent
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.setting import AUTO
from telerag_cli.system import available_bytes, spin_at_barriers
from telerag_cli.tiers.rates import JoinRates
from telerag_cli.tracing import Tracer
from telerag_cli.units import format_bytes


class Reporter:
    """What a person is told while an engine opens and works; this one tells nothing."""

    def say(self, message: str) -> None:
        """Something worth knowing."""

    def warn(self, message: str) -> None:
        """Something that is not as it was asked for."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """A plan, before it is carried out."""

    def progress(self, description: str, total: int | None, *, unit: str = "") -> AbstractContextManager[Advance]:
        """A stage of ``total`` units, while the block runs."""
        return silent(description, total, unit=unit)


SILENT = Reporter()


class SearchOnly:
    """The generator of an engine that was opened to search only: it refuses to write."""

    name, context_tokens, parallel = "none", 0, 1

    def count_tokens(self, _messages: Sequence[Message]) -> int:
        """See `Generator`; there is nothing to count with."""
        return 0

    async def generate(self, _request: Request, _on_text: OnText | None = None) -> Generation:
        """See `Generator`.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "This engine was opened without an LLM.", remedy="Open it with generate=True to ask questions."
        )

    def forget(self) -> None:
        """See `Generator`."""

    def close(self) -> None:
        """See `Generator`."""


@dataclass(frozen=True)
class Prepared:
    """An index with its embedder, and the memory that the rest will take: planned, not taken."""

    opened: OpenedIndex
    tier: PlannedTier
    llm: PlannedLlm | None
    k: int
    nprobe: int

    @property
    def identity(self) -> tuple[Identity, dict[str, str]]:
        """What a profile of these parts is of, and the versions of the libraries."""
        return identity_of(self.opened.index, self.tier.name, self.llm, embedder_name(self.opened.embedder))


def prepare(
    config: EngineConfig,
    reporter: Reporter = SILENT,
    *,
    opened: OpenedIndex | None = None,
    sharers: int = 1,
    generate: bool = True,
) -> Prepared:
    """Open index, passages and embedder, and plan and show the memory of the rest.

    Args:
        config: the settings.
        reporter: is told of the plan.
        opened: index, passages and embedder, if they are open already.
        sharers: processes that plan to share this machine's memory, this one included.
        generate: whether an LLM is wanted.

    Raises:
        TeleragError: something is missing, does not fit, or contradicts something else.
    """
    index = opened.index if opened else Index.open(config.index)
    k, nprobe = search_depth(index, config)
    tier = plan_tier(index, config)
    llm = plan_llm(config, tier, reporter.warn, sharers) if generate else None
    opened = opened or open_index(index, config.embedder, config.device)
    free = ("free", "RAM", format_bytes(available_bytes()))
    rows = [*tier.rows, *(llm.rows if llm else []), free]
    reporter.table(f"Memory ({tier.kind} tier: {tier.why})", ("what", "where", "size"), rows)
    return Prepared(opened, tier, llm, k, nprobe)


def open_retriever(
    index: Index,
    tier: PlannedTier,
    config: EngineConfig,
    *,
    tracer: Tracer | None = None,
    reporter: Reporter = SILENT,
    rates: JoinRates | None = None,
) -> Retriever:
    """A retriever over the planned tier, which takes its memory now."""
    coarse = Coarse(index.centroids, index.manifest.metric)
    opened = tier.open(coarse, tracer, reporter.progress, rates)
    return Retriever(
        index, coarse, opened, rescore=config.rescore, budget_bytes=config.prefetch_budget_bytes, tracer=tracer
    )


@contextlib.contextmanager
def open_parts(config: EngineConfig, reporter: Reporter) -> Iterator[tuple[Prepared, Generator, Retriever]]:
    """The parts of an engine, not put together, to be measured; closed at the end."""
    made = prepare(config, reporter)
    assert made.llm
    made.opened.embedder.warm_up(approximate=True)
    with (
        contextlib.closing(made.llm.open()) as generator,
        contextlib.closing(open_retriever(made.opened.index, made.tier, config, reporter=reporter)) as retriever,
    ):
        yield made, generator, retriever


def open_engine(
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
) -> Engine:
    """Everything together, and ready: the first question waits for nothing; see `Engine.open` for the arguments.

    What was opened is closed if a part fails. The LLM comes before the arena, which on a GPU may take what is left.
    """
    spin_at_barriers()
    if retriever is not None:
        assert opened, "whoever has the retriever has the index"
        parts = generator or SearchOnly(), opened.embedder, retriever, opened.passages
        return Engine(*parts, config, finder=finder, tracer=tracer)
    made = prepare(config, reporter, opened=opened, sharers=sharers, generate=generate and generator is None)
    averages: Averages | None = None
    known: Profile | None = None
    if generate and config.profile != NONE:
        averages, known = _kept_plan(config, made)
    made.opened.embedder.warm_up(approximate=generate and config.lookahead is not Lookahead.OFF)
    with contextlib.ExitStack() as undo:
        if generator is None and made.llm is not None:
            generator = made.llm.open()
            undo.callback(generator.close)
        rates = rates_for_joins(known) if known else None
        searching = open_retriever(made.opened.index, made.tier, config, tracer=tracer, reporter=reporter, rates=rates)
        undo.callback(searching.close)
        planner: Planner | None = None
        if averages is not None:
            assert generator is not None
            profile = known or _measured(config, made, generator, searching, reporter)
            if profile is not None:
                arena, most = searching.tier.arena_bytes, config.prefetch_budget_bytes
                planner = Planner(profile, averages, nprobe=made.nprobe, arena_bytes=arena, most_bytes=most)
        engine = Engine(
            generator or SearchOnly(),
            made.opened.embedder,
            searching,
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
            _show_plan(engine, reporter)
        undo.pop_all()
    for note in searching.tier.notes:
        reporter.warn(note)
    return engine


def _kept_plan(config: EngineConfig, made: Prepared) -> tuple[Averages, Profile | None]:
    """What earlier runs of these parts showed, and the profile that was named or kept."""
    identity, versions = made.identity
    kept = kept_in(identity, versions)
    known: Profile | None = None
    if config.profile != AUTO:
        known = Profile.load(Path(config.profile))
        known.check(identity, Path(config.profile))
    elif kept.exists():
        known = Profile.load(kept)
    return Averages(kept.with_suffix(".averages.json")), known


def _measured(
    config: EngineConfig, made: Prepared, generator: Generator, retriever: Retriever, reporter: Reporter
) -> Profile | None:
    """A profile measured now and kept; None where that is not to be done or failed."""
    if config.generator is GeneratorKind.OPENAI:
        reporter.warn("A server is not measured unasked, so nothing is predicted; telerag profile measures it.")
        return None
    reporter.say("Measuring this machine and index to plan with; once, some seconds. --profile none goes without.")
    subject = subject_of(made.opened, made.tier.gpu, retriever, generator, made.nprobe, made.identity)
    try:
        with reporter.progress("measuring", None) as advance:
            profile = measure(subject, quick=True, advance=advance, command="telerag run")
        profile.save(kept_in(*made.identity))
    except (ResourceError, ArtifactError) as error:
        reporter.warn(f"Nothing is predicted, because measuring failed: {error}")
        return None
    return profile


def _show_plan(engine: Engine, reporter: Reporter) -> None:
    from telerag_cli.engine.explain import explain

    planner = engine.shared.planner
    if planner is None:
        reporter.warn("There is no profile to explain a plan with.")
        return
    name = engine.config.pipeline.value
    rows = explain(engine, planner, engine.pipeline)
    reporter.table(f"Plan ({name}, one question alone)", ("what", "expected", "why"), rows)
