"""Opening what answering needs, in the order that fails soonest: index, embedder, LLM, arena."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from telerag_cli.config import DEFAULT_K, DEFAULT_NPROBE, Lookahead, format_bytes
from telerag_cli.embedding.encoder import Encoder
from telerag_cli.engine.engine import Engine
from telerag_cli.engine.session import Settings
from telerag_cli.errors import ModelError
from telerag_cli.generation.base import Generator
from telerag_cli.index.artifact import Index
from telerag_cli.index.passages import Passages
from telerag_cli.index.scoring import Coarse
from telerag_cli.lookahead.retriever import Retriever
from telerag_cli.tiers.cache import CacheKind
from telerag_cli.tiers.host import open_host_tier
from telerag_cli.tiers.transport import available_bytes
from telerag_cli.tracing import Tracer

Row = tuple[str, str, str]
"""Of a byte plan: what, where, how much."""


@dataclass(frozen=True)
class Opened:
    """An index with its passages and the embedder of its questions."""

    index: Index
    passages: Passages
    embedder: Encoder


def open_index(root: Path, embedder: str | None, device: str = "auto") -> Opened:
    """Open an index and the embedder that its manifest names, or the one named here.

    Raises:
        ArtifactError: the index is damaged.
        ModelError: no embedder is known, or its vectors are of another dimension.
    """
    index = Index.open(root)
    passages = Passages.open(index.paths.passages)
    name = embedder or index.manifest.embedder.model
    if name is None:
        raise ModelError(
            f"{root} does not say which model made its vectors.", remedy="Name it with --embedder."
        )
    encoder = Encoder.load(name, device=device)
    if encoder.info.dimension != index.manifest.dimension:
        raise ModelError(f"{name} makes vectors of {encoder.info.dimension} dimensions, and {root} has {index.manifest.dimension}.",
                         remedy="Name the model that made them with --embedder.")  # fmt: skip
    return Opened(index, passages, encoder)


def open_retriever(
    index: Index,
    fast_memory_bytes: int,
    *,
    cache: CacheKind = CacheKind.HOTNESS,
    tracer: Tracer | None = None,
) -> Retriever:
    """A retriever over the ``host`` link with an arena of this size."""
    coarse = Coarse(index.centroids, index.manifest.metric)
    tier = open_host_tier(index, coarse, fast_memory_bytes, cache=cache, tracer=tracer)
    return Retriever(index, coarse, tier, tracer=tracer)


def open_engine(
    opened: Opened,
    open_llm: Callable[[], Generator],
    fast_memory_bytes: int,
    settings: Settings,
    *,
    tracer: Tracer | None = None,
) -> Engine:
    """Everything together, and ready: the first question waits for nothing. What was opened is closed if a part fails."""
    opened.embedder.warm_up(sketching=settings.lookahead is not Lookahead.OFF)
    retriever = open_retriever(opened.index, fast_memory_bytes, tracer=tracer)
    with contextlib.ExitStack() as undo:
        undo.callback(retriever.close)
        retriever.check(settings.k, settings.nprobe)
        generator = open_llm()
        undo.pop_all()
    return Engine(generator, opened.embedder, retriever, opened.passages, settings, tracer=tracer)


def default_nprobe(index: Index) -> int:
    """How many lists to probe if nobody says: 32, or all of a smaller index."""
    return min(DEFAULT_NPROBE, index.manifest.nlist)


def default_k(index: Index) -> int:
    """How many passages to retrieve if nobody says: 5, or all of a smaller index."""
    return min(DEFAULT_K, index.manifest.ntotal)


def byte_plan(index: Index, fast_memory_bytes: int, llm: Sequence[Row] = ()) -> list[Row]:
    """What will take memory, the LLM's rows included, and last what is free."""
    lists = int(index.extents.sum())
    return [
        ("index lists", "disk", format_bytes(lists)),
        ("arena", "RAM", format_bytes(min(fast_memory_bytes, lists))),
        ("centroids", "RAM", format_bytes(2 * index.centroids.nbytes)),
        *llm,
        ("free", "RAM", format_bytes(available_bytes())),
    ]
