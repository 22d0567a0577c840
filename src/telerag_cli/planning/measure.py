"""All measurements of ``telerag profile``, one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from telerag_cli.config import PAGE_BYTES, Metric, Storage
from telerag_cli.embedding.encoder import Encoder
from telerag_cli.files import HeldFile
from telerag_cli.index.scoring import Coarse
from telerag_cli.llm.base import Generator
from telerag_cli.planning.formulas import mean_list_bytes
from telerag_cli.planning.hits import Replayed, index_figures
from telerag_cli.planning.links import link_points, slot_of
from telerag_cli.planning.lists import joins_of, moving_rates, scoring_rates, storage_rates
from telerag_cli.planning.llm import llm_rates, steps_s, write
from telerag_cli.planning.profile import EmbeddingTimes, Identity, Memory, Profile
from telerag_cli.planning.timing import Effort, seconds
from telerag_cli.progress import Advance
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.system import available_bytes

if TYPE_CHECKING:
    from telerag_cli.tiers.cuda.gpu import Gpu

KIB, MIB = 1 << 10, 1 << 20
LARGEST_TRANSFER = 16 * MIB
REFINEMENTS = 3
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


QUICK = Extent(Effort(0.06, 3, 1, 1.5), (64 * KIB, 4 * MIB), (1, 2), (32, 128), (1, 4), 16, 6, 3)
FULL = Extent(
    Effort(0.2, 5, 2, 3.0),
    (16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, LARGEST_TRANSFER),
    (1, 2, 4),
    (32, 128, 512, 1024),
    (1, 2, 4, 8, 16),
    32,
    16,
    8,
)


@dataclass(frozen=True)
class ProfileSubject:
    """What is to be measured; None for what there is not."""

    identity: Identity
    versions: dict[str, str]
    gpu: Gpu | None
    lists: Path | HeldFile
    """A file to read from: the index's lists, if there is an index."""
    encoder: Encoder
    generator: Generator
    retriever: Retriever | None = None
    """Of the index, if there is one; `nprobe` and `replayed` are for it."""
    nprobe: int = 0
    replayed: Sequence[Replayed] = ()
    source: str = ""
    """Where the replayed questions are from."""
    left_out: tuple[str, ...] = ()


def measure(subject: ProfileSubject, *, quick: bool, advance: Advance, command: str = "") -> Profile:
    """Measure all of it; an index's arena is empty afterwards.

    ``quick`` takes fewer points and repeats. Calls ``advance`` for each figure.

    Raises:
        TeleragError: a device, a file or the LLM failed.
    """
    began_s = time.perf_counter()
    extent = QUICK if quick else FULL
    effort, encoder, generator, retriever = extent.effort, subject.encoder, subject.generator, subject.retriever
    links = []
    for point in link_points(subject.gpu, subject.lists, _sizes(extent.sizes, retriever), extent.depths, effort):
        links.append(point)
        advance(1)
    slot = slot_of(subject.gpu)  # right after transfers, for an idle device reports less
    scoring, coarse_s, figures, joins, moving = [], None, None, None, None
    dimension, metric, own = encoder.info.dimension, Metric.IP, None
    if retriever is not None:
        index = retriever.index
        dimension, metric, own = index.manifest.dimension, index.manifest.metric, index.manifest.storage
        scoring += scoring_rates(index, retriever.tier, effort)
        advance(1)
        coarse, query = Coarse(index.centroids, metric), index.centroids[:1]
        coarse_s = seconds(lambda: coarse.probe(query, subject.nprobe), effort)
        replayed = subject.replayed[: extent.replayed]
        figures = index_figures(index, encoder, replayed, subject.source, subject.nprobe, advance)
        texts = [each.text for each in subject.replayed[: extent.joins]]
        joins = joins_of(retriever, encoder.encode_queries(texts), subject.nprobe)
        advance(1)
        moving = moving_rates(retriever, generator, 2 * extent.tokens, effort)
        advance(1)
    if not quick:
        others = [storage for storage in Storage if storage is not own]
        scoring += storage_rates(subject.gpu, dimension, metric, others, effort)
    llm = llm_rates(generator, extent.prompts, extent.widths, extent.tokens, effort, advance)
    embedding = _embedding(generator, encoder, subject.replayed, extent)
    advance(1)
    memory = [Memory("RAM", available_bytes())]
    if subject.gpu is not None:
        memory.append(Memory(subject.gpu.name, subject.gpu.free_bytes()))
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
        embedding=embedding,
        llm=llm,
        index=figures,
        pcie=slot,
        memory=tuple(memory),
        left_out=subject.left_out,
        command=command,
    )


def _sizes(sizes: Sequence[int], retriever: Retriever | None) -> list[int]:
    mean = 0.0 if retriever is None else mean_list_bytes(retriever.index.list_bytes)
    if not mean:
        return list(sizes)
    return sorted({*sizes, min(max(round(mean / PAGE_BYTES), 1) * PAGE_BYTES, LARGEST_TRANSFER)})


def _embedding(generator: Generator, encoder: Encoder, replayed: Sequence[Replayed], extent: Extent) -> EmbeddingTimes:
    """Times of both embeddings, and what an approximate one made while the LLM writes adds to the LLM's time."""
    text = replayed[0].text if replayed else QUESTION
    query_s = seconds(lambda: encoder.encode_queries([text]), extent.effort)
    approx_s = seconds(lambda: encoder.embed_approx([text]), extent.effort)

    def embed_approx(begun: threading.Event, _ended: threading.Event) -> None:
        begun.wait()
        for _ in range(REFINEMENTS):
            encoder.embed_approx([text])

    costs: list[float] = []
    for _ in range(extent.effort.runs):
        plain, disturbed = (sum(steps_s(write(generator, extent.tokens, each))) for each in (None, embed_approx))
        costs.append((disturbed - plain) / REFINEMENTS)
    return EmbeddingTimes(query_s, approx_s, max(float(np.median(costs)), 0.0))
