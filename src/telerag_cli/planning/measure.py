"""Everything that ``telerag profile`` measures, one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from telerag_cli.config import PAGE_BYTES
from telerag_cli.embedding.encoder import Encoder
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse
from telerag_cli.llm.base import Generator
from telerag_cli.planning.hits import Replayed, index_figures
from telerag_cli.planning.lists import joins_of, moving_rates, scoring_rates
from telerag_cli.planning.llm import llm_rates, write
from telerag_cli.planning.profile import EmbeddingTimes, Identity, LinkPoint, Memory, Pcie, Profile, ScoringRate
from telerag_cli.planning.timing import FULL, QUICK, Effort, seconds
from telerag_cli.progress import Advance
from telerag_cli.retrieval.retriever import Retriever

Sweep = Callable[[Sequence[int], Sequence[int], Effort], Iterator[LinkPoint]]
"""Measures the link alone, by sizes and depths."""

KIB, MIB = 1 << 10, 1 << 20
LARGEST_TRANSFER = 16 * MIB
SKETCHES = 3
QUESTION = "How do I find the median of some numbers, and which module of the standard library has it?"


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    effort: Effort
    sizes: tuple[int, ...]
    """Of transfers; the index's mean list is added."""
    depths: tuple[int, ...]
    prompts: tuple[int, ...]
    widths: tuple[int, ...]
    tokens: int
    """Written for each figure of the LLM."""
    replayed: int
    joins: int
    """Queries whose joins are timed, and one to warm up."""


QUICK_EXTENT = Extent(QUICK, (64 * KIB, 4 * MIB), (1, 2), (32, 128), (1, 4), 16, 6, 3)
FULL_EXTENT = Extent(
    FULL,
    (16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, LARGEST_TRANSFER),
    (1, 2, 4),
    (32, 128, 512, 1024),
    (1, 2, 4, 8, 16),
    32,
    16,
    8,
)


@dataclass(frozen=True)
class Subject:
    """What is to be measured; None for what there is not."""

    identity: Identity
    versions: dict[str, str]
    sweep: Sweep
    encoder: Encoder
    generator: Generator | None = None
    index: Index | None = None
    retriever: Retriever | None = None
    nprobe: int = 0
    replayed: Sequence[Replayed] = ()
    source: str = ""
    other_storages: Callable[[Effort], list[ScoringRate]] = field(default=lambda _effort: [])
    memory: Callable[[], list[Memory]] = field(default=lambda: [])
    slot: Callable[[], Pcie | None] = field(default=lambda: None)
    left_out: tuple[str, ...] = ()


def measure(subject: Subject, *, quick: bool, advance: Advance, command: str = "") -> Profile:
    """Measure all of it.

    Args:
        subject: what.
        quick: fewer points and repeats.
        advance: told of each figure.
        command: what made it, for the record.

    Raises:
        TeleragError: a device, a file or the LLM failed.
    """
    began_s = time.perf_counter()
    extent = QUICK_EXTENT if quick else FULL_EXTENT
    effort, index, retriever, generator = extent.effort, subject.index, subject.retriever, subject.generator
    links = []
    for point in subject.sweep(_sizes(extent.sizes, index), extent.depths, effort):
        links.append(point)
        advance(1)
    slot = subject.slot()  # right after transfers, for an idle device reports less
    scoring, coarse_s, figures, joins, moving = [], None, None, None, None
    if index is not None and retriever is not None:
        scoring += scoring_rates(index, retriever.tier, effort)
        advance(1)
        coarse = Coarse(index.centroids, index.manifest.metric)
        query = index.centroids[:1]
        coarse_s = seconds(lambda: coarse.probe(query, subject.nprobe), effort)
        replayed = subject.replayed[: extent.replayed]
        figures = index_figures(index, subject.encoder, replayed, subject.source, subject.nprobe, advance)
        texts = [each.text for each in subject.replayed[: extent.joins]]
        joins = joins_of(retriever, subject.encoder.encode_queries(texts), subject.nprobe)
        advance(1)
        moving = moving_rates(retriever, generator, 2 * extent.tokens, effort)
        advance(1)
    if not quick:
        scoring += subject.other_storages(effort)
    llm = None
    if generator is not None:
        llm = llm_rates(generator, extent.prompts, extent.widths, extent.tokens, effort, advance)
    query_text = subject.replayed[0].text if subject.replayed else QUESTION
    query_s, sketch_s = (
        seconds(lambda embed=embed: embed([query_text]), effort)  # type: ignore[misc]
        for embed in (subject.encoder.encode_queries, subject.encoder.embed_approx)
    )
    costs_s = 0.0 if generator is None else _sketch_costs(generator, subject.encoder, query_text, extent.tokens, effort)
    advance(1)
    return Profile(
        identity=subject.identity,
        quick=quick,
        took_s=round(time.perf_counter() - began_s, 2),
        measured_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=subject.versions,
        links=tuple(links),
        moving=moving,
        scoring=tuple(scoring),
        joins=joins,
        coarse_s=coarse_s,
        embedding=EmbeddingTimes(query_s, sketch_s, costs_s),
        llm=llm,
        index=figures,
        pcie=slot,
        memory=tuple(subject.memory()),
        left_out=subject.left_out,
        command=command,
    )


def _sizes(sizes: Sequence[int], index: Index | None) -> list[int]:
    if index is None or not (index.list_bytes > 0).any():
        return list(sizes)
    mean = float(index.list_bytes[index.list_bytes > 0].mean())
    return sorted({*sizes, min(max(round(mean / PAGE_BYTES), 1) * PAGE_BYTES, LARGEST_TRANSFER)})


def _sketch_costs(generator: Generator, encoder: Encoder, text: str, tokens: int, effort: Effort) -> float:
    """What a sketch made while the LLM writes adds to its time: texts with some, against texts without."""
    costs: list[float] = []

    def embed_approx(begun: threading.Event, _ended: threading.Event) -> None:
        begun.wait()
        for _ in range(SKETCHES):
            encoder.embed_approx([text])

    for _ in range(effort.runs):
        plain, disturbed = (sum(write(generator, tokens, beside).step_s()) for beside in (None, embed_approx))
        costs.append((disturbed - plain) / SKETCHES)
    return max(float(np.median(costs)), 0.0)
