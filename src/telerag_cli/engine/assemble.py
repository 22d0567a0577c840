"""Opening what answering needs, in the order that fails soonest: index, embedder, LLM, arena."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from telerag_cli.config import DEFAULT_K, DEFAULT_NPROBE, Lookahead, format_bytes
from telerag_cli.embedding.encoder import Encoder
from telerag_cli.engine.engine import Engine
from telerag_cli.engine.session import Settings
from telerag_cli.engine.tier_plan import PlannedTier, Row
from telerag_cli.errors import ModelError
from telerag_cli.index.artifact import Index
from telerag_cli.index.passages import Passages
from telerag_cli.index.scoring import Coarse
from telerag_cli.llm.base import Generator
from telerag_cli.planning.averages import Averages
from telerag_cli.planning.planner import Planner
from telerag_cli.progress import Progress, silent
from telerag_cli.retrieval.retriever import Retriever, check_search
from telerag_cli.system import available_bytes
from telerag_cli.tiers.rates import JoinRates
from telerag_cli.tracing import Tracer


@dataclass(frozen=True)
class Opened:
    """An index with its passages and the embedder of its questions."""

    index: Index
    passages: Passages
    embedder: Encoder


def open_index(index: Index, embedder: str | None, device: str = "auto") -> Opened:
    """Open an index's passages and the embedder that its manifest names, or the one named here.

    Raises:
        ArtifactError: the index is damaged.
        ModelError: no embedder is known, or its vectors are of another dimension.
    """
    root = index.paths.root
    passages = Passages.open(index.paths.passages)
    name = embedder or index.manifest.embedder.model
    if name is None:
        raise ModelError(f"{root} does not say which model made its vectors.", remedy="Name it with --embedder.")
    encoder = Encoder.load(name, device=device)
    if encoder.info.dimension != index.manifest.dimension:
        raise ModelError(
            f"{name} makes vectors of {encoder.info.dimension} dimensions, and {root} has {index.manifest.dimension}.",
            remedy="Name the model that made them with --embedder.",
        )
    return Opened(index, passages, encoder)


def open_retriever(
    index: Index,
    tier: PlannedTier,
    *,
    rescore: int | None = None,
    tracer: Tracer | None = None,
    progress: Progress = silent,
    rates: JoinRates | None = None,
    budget_bytes: int | None = None,
) -> Retriever:
    """A retriever over the planned tier, which takes its memory now."""
    coarse = Coarse(index.centroids, index.manifest.metric)
    opened = tier.open(coarse, tracer, progress, rates)
    return Retriever(index, coarse, opened, rescore=rescore, budget_bytes=budget_bytes, tracer=tracer)


@dataclass(frozen=True)
class Planning:
    """What an engine plans with; nothing by default."""

    rates: JoinRates | None = None
    budget_bytes: int | None = None
    """That lookahead may move in one round."""
    averages: Averages | None = None
    make_planner: Callable[[Generator, Retriever], Planner | None] = lambda _generator, _retriever: None
    """Called when everything is open, and may measure it."""


def open_engine(
    opened: Opened,
    open_llm: Callable[[], Generator],
    tier: PlannedTier,
    settings: Settings,
    *,
    rescore: int | None = None,
    planning: Planning = Planning(),
    tracer: Tracer | None = None,
    progress: Progress = silent,
) -> Engine:
    """Everything together, and ready: the first question waits for nothing. What was opened is closed if a part fails.

    The LLM comes before the arena, which on a GPU may take what is left.
    """
    check_search(opened.index, settings.k, settings.nprobe)
    opened.embedder.warm_up(approximate=settings.lookahead is not Lookahead.OFF)
    with contextlib.ExitStack() as undo:
        generator = open_llm()
        undo.callback(generator.close)
        retriever = open_retriever(
            opened.index,
            tier,
            rescore=rescore,
            tracer=tracer,
            progress=progress,
            rates=planning.rates,
            budget_bytes=planning.budget_bytes,
        )
        undo.callback(retriever.close)
        planner = planning.make_planner(generator, retriever)
        undo.pop_all()
    return Engine(
        generator,
        opened.embedder,
        retriever,
        opened.passages,
        settings,
        averages=planning.averages,
        planner=planner,
        tracer=tracer,
    )


def default_nprobe(index: Index) -> int:
    """How many lists to probe if nobody says: 32, or all of a smaller index."""
    return min(DEFAULT_NPROBE, index.manifest.nlist)


def default_k(index: Index) -> int:
    """How many passages to retrieve if nobody says: 5, or all of a smaller index."""
    return min(DEFAULT_K, index.manifest.ntotal)


def byte_plan(tier: PlannedTier, llm: Sequence[Row] = ()) -> list[Row]:
    """What will take memory, the LLM's rows included, and last what is free."""
    return [*tier.rows, *llm, ("free", "RAM", format_bytes(available_bytes()))]
