"""Speed at which a tier moves and scores lists, through the very calls that lookahead and joins make."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from telerag_cli.arrays import ByteArray, FloatArray, IntArray
from telerag_cli.config import PAGE_BYTES, Metric, Storage
from telerag_cli.errors import ResourceError, TeleragError
from telerag_cli.index.artifact import ID_BYTES, EmbedderInfo, Index, IndexPaths, Manifest, code_size, lay_out
from telerag_cli.index.scoring import Coarse
from telerag_cli.llm.base import Generator
from telerag_cli.planning.formulas import join_fixed_s, mean_list_bytes, overlap_loss, scoring_latency_s
from telerag_cli.planning.llm import mean_step_s, write
from telerag_cli.planning.profile import Joins, LossPoint, Measured, Moving, ScoringRate
from telerag_cli.planning.timing import Effort, seconds
from telerag_cli.prefetch.prefetcher import Window
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.tiers.host import open_host_tier
from telerag_cli.tiers.rates import ScoreLists
from telerag_cli.tiers.tier import FastTier, PinResult

if TYPE_CHECKING:
    from telerag_cli.tiers.cuda.gpu import Gpu

NLIST = 64
LIST_BYTES = 1 << 20

POLL_S = 0.002
TRIED_BYTES = 512 << 20
"""Of lists that are scored for a rate, where the arena holds so many; more than processors have cache."""
MISSED = (0.1, 0.5)
"""Shares of the lists of a join that are not in fast memory."""
PARTS = 4
"""They are scored a part at a time."""
LONGEST_S = 60.0


def moving_rates(retriever: Retriever, generator: Generator | None, tokens: int, effort: Effort) -> Moving:
    """Move lists in random orders, alone and beside an LLM that writes; the arena is emptied before and after.

    The LLM writes ``tokens`` meanwhile; without one, moving beside it is as moving alone.
    """
    alone = [_rate(_move(retriever, effort.seconds)) for _ in range(effort.repeats)]
    beside: list[float] = []
    slowed = [1.0]

    def keep_moving(_begun: threading.Event, ended: threading.Event) -> None:
        # From the beginning of the prompt on, as lookahead does it.
        while not ended.is_set():
            if (window := _move(retriever, LONGEST_S, ended)).bytes_moved:
                beside.append(_rate(window))

    if generator is not None:
        pairs = [
            (mean_step_s(write(generator, tokens)), mean_step_s(write(generator, tokens, keep_moving)))
            for _ in range(effort.runs)
        ]
        slowed = [disturbed_s / plain_s if plain_s else 1.0 for plain_s, disturbed_s in pairs]
    return Moving(Measured.of(alone), Measured.of(beside or alone), max(1.0, float(np.median(slowed))))


def _move(retriever: Retriever, at_most_s: float, ended: threading.Event | None = None) -> Window:
    """Move lists into an empty arena until it is full, for at most so long, or until the event."""
    retriever.tier.forget()
    nlist, dimension = retriever.index.centroids.shape
    query = np.random.default_rng().standard_normal((1, dimension), np.float32)
    ahead = retriever.prefetch(query, nlist)
    until_s = time.perf_counter() + at_most_s
    while not ahead.idle and time.perf_counter() < until_s and not (ended and ended.is_set()):
        time.sleep(POLL_S)
    ahead.end()
    while ahead.under_way:
        time.sleep(POLL_S)
    retriever.tier.forget()
    return ahead.window


def _rate(window: Window) -> float:
    return window.bytes_moved / max(window.moving_s, 1e-9)


@dataclass(frozen=True)
class _Join:
    """How long a join took, and the bytes that were in fast memory and those that were not."""

    took_s: float
    hit: int
    missed: int

    def beyond_s(self, fixed_s: float) -> float:
        """Time beside what any join takes; never 0, as it could be by chance where there is little to do."""
        return max(self.took_s - fixed_s, self.took_s / 20, 1e-9)


def joins_of(retriever: Retriever, queries: FloatArray, nprobe: int) -> Joins:
    """Time joins with all, none and a part of their lists in fast memory; the arena is emptied before and after.

    Queries have shape (n, dimension); the first warms up. Each probes ``nprobe`` lists, or fewer where they would not
    fit the arena.
    """
    tier = retriever.tier
    # Twice the mean, because lists near to queries are larger.
    count = max(1, min(nprobe, int(tier.arena_bytes / (2 * mean_list_bytes(retriever.index.list_bytes)))))
    few = max(1, count // 8)
    # Nearest first, so a search for fewer lists leaves the farthest to be missed.
    parts = sorted({max(1, count - round(count * share)) for share in MISSED}, reverse=True)

    def join(query: FloatArray, held: int, probed: int) -> _Join:
        tier.forget()
        bring(tier, retriever.order(query[None])[:held])
        report = retriever.search(query[None], 5, probed).report
        return _Join(report.join_s, report.bytes_wanted - report.bytes_missed, report.bytes_missed)

    kinds = [(0, count), (count, count), (few, few), *((part, count) for part in parts)]
    rows = [[join(query, *kind) for kind in kinds] for query in queries]
    none, every, little, *partly = zip(*(rows[1:] or rows), strict=True)
    tier.forget()
    pairs = zip(little, every, strict=True)
    fixed_s = max(float(np.median([join_fixed_s(a.took_s, a.hit, b.took_s, b.hit) for a, b in pairs])), 0.0)
    hits = Measured.of([each.hit / each.beyond_s(fixed_s) for each in every])
    misses = Measured.of([each.missed / each.beyond_s(fixed_s) for each in none])

    def loss_of(these: Sequence[_Join]) -> LossPoint:
        losses = [
            overlap_loss(each.hit / max(hits.value, 1.0), each.missed / max(misses.value, 1.0), each.took_s - fixed_s)
            for each in these
        ]
        shares = [each.missed / max(each.hit + each.missed, 1) for each in these]
        return LossPoint(float(np.mean(shares)), float(np.median(losses)))

    return Joins(fixed_s, hits, misses, tuple(map(loss_of, partly)), retriever.slowdown)


def scoring_rates(index: Index, tier: FastTier, effort: Effort) -> list[ScoringRate]:
    """Time scoring in the arena and, where the tier can, in place; the arena is emptied after."""
    lists = np.random.default_rng(0).permutation(np.flatnonzero(index.list_bytes > 0))
    fitting = np.cumsum(index.list_bytes[lists]) <= min(TRIED_BYTES, tier.arena_bytes)
    lists = lists[fitting] if fitting.any() else lists[:1]
    if not len(lists):
        return []
    pinned = _pin(tier, lists)
    here = np.setdiff1d(lists, pinned.absent)
    try:
        rates = [_scoring("arena", tier.score, index, here, effort)]
        if tier.in_place:
            rates.append(_scoring("in place", tier.in_place.score, index, lists, effort))
    finally:
        tier.release(here.tolist())
        tier.forget()
    return rates


def bring(tier: FastTier, lists: IntArray) -> None:
    """Move lists into the arena, as many of them as there is room for.

    Raises:
        TeleragError: one could not be moved.
    """
    pinned = _pin(tier, lists)
    tier.release(np.setdiff1d(lists, pinned.absent).tolist())


def _pin(tier: FastTier, lists: IntArray) -> PinResult:
    """Pin lists, and wait until they are there; raises TeleragError if one could not be moved."""
    arrived = threading.Semaphore(0)
    errors: list[TeleragError] = []

    def told(some: Sequence[int], error: TeleragError | None) -> None:
        if error is not None:
            errors.append(error)
        arrived.release(len(some))

    pinned = tier.pin(lists.tolist(), told)
    for _ in (*pinned.coming, *pinned.started):
        arrived.acquire()
    if errors:
        raise errors[0]
    return pinned


def _scoring(place: str, score: ScoreLists, index: Index, lists: IntArray, effort: Effort) -> ScoringRate:
    query: FloatArray = index.centroids[:1]
    count = max(1, len(lists) // PARTS)
    few = max(1, count // 8)

    def timed(count: int) -> Measured:
        # Others each time: what a processor's cache still has of the last ones would be scored far too quickly.
        turns = itertools.cycle([lists[start : start + count] for start in range(0, len(lists) - count + 1, count)])
        return seconds(lambda: score(query, next(turns)[None], 5), effort)

    all_s, few_s = timed(count), timed(few)
    mean = float(index.list_bytes[lists].mean())
    latency_s = scoring_latency_s(few * mean, few_s.value, count * mean, all_s.value)
    value, low, high = (count * mean / max(took_s - latency_s, 1e-9) for took_s in (all_s.value, all_s.high, all_s.low))
    return ScoringRate(place, index.manifest.storage.value, Measured(value, low, high, all_s.repeats), latency_s)


class MadeLists:
    """A `HostLists` of made-up vectors."""

    def __init__(self, memory: ByteArray) -> None:
        self.memory = memory

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def make_index(root: Path, dimension: int, metric: Metric, storage: Storage) -> tuple[Index, MadeLists]:
    """Make up an index of 64 lists of about 1 MiB, of which nothing is written to its folder yet, and its lists."""
    random = np.random.default_rng(0)
    size = code_size(dimension, storage)
    count = LIST_BYTES // (size + ID_BYTES)
    table, nbytes = lay_out(np.full(NLIST, count, np.int64), size)
    memory = np.zeros(-(-nbytes // PAGE_BYTES) * PAGE_BYTES, np.uint8)
    vectors = random.standard_normal((count, dimension), np.float32) / np.float32(np.sqrt(dimension))
    codes = {
        Storage.FLOAT32: vectors,
        Storage.FLOAT16: vectors.astype(np.float16),
        Storage.INT8: random.integers(256, size=(count, dimension), dtype=np.uint8),
    }[storage]
    raw = np.ascontiguousarray(codes).view(np.uint8).ravel()
    for number, (_size, capacity, offset) in enumerate(table.tolist()):
        memory[offset : offset + len(raw)] = raw
        rows = np.arange(number * count, (number + 1) * count)
        ids = offset + capacity * size
        memory[ids : ids + count * ID_BYTES] = rows.view(np.uint8)
    trained = np.concatenate([np.full(dimension, -1.0), np.full(dimension, 2.0)]).astype(np.float32)
    manifest = Manifest(dimension, metric, storage, NLIST, NLIST * count, size, 0, EmbedderInfo(None), {})
    centroids = random.standard_normal((NLIST, dimension), np.float32)
    return (
        Index(IndexPaths(root), manifest, centroids, table, trained if storage is Storage.INT8 else None),
        MadeLists(memory),
    )


def storage_rates(
    gpu: Gpu | None, dimension: int, metric: Metric, storages: Iterable[Storage], effort: Effort
) -> list[ScoringRate]:
    """Measure storage types in a tier on this GPU, or in RAM; a type without room for its lists is left out."""
    found: list[ScoringRate] = []
    for storage in storages:
        with tempfile.TemporaryDirectory(prefix="telerag-profile-") as folder, contextlib.suppress(ResourceError):
            index, lists = make_index(Path(folder), dimension, metric, storage)
            with contextlib.closing(_tier_over(gpu, index, lists)) as tier:
                found += scoring_rates(index, tier, effort)
    return found


def _tier_over(gpu: Gpu | None, index: Index, lists: MadeLists) -> FastTier:
    coarse, nbytes = Coarse(index.centroids, index.manifest.metric), int(index.list_bytes.sum())
    if gpu is None:
        lists.memory.tofile(index.paths.lists)
        return open_host_tier(index, coarse, nbytes)
    from telerag_cli.tiers.cuda.tier import open_cuda_tier

    return open_cuda_tier(index, coarse, gpu, nbytes, lists=lists)
