"""How fast a tier moves and scores lists: through the very calls that lookahead and joins make."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.errors import TeleragError
from telerag_cli.index.artifact import Index
from telerag_cli.llm.base import Generator
from telerag_cli.planning.formulas import overlap_loss
from telerag_cli.planning.llm import write
from telerag_cli.planning.profile import Joins, LossPoint, Measured, Moving, ScoringRate
from telerag_cli.planning.timing import Effort, seconds
from telerag_cli.prefetch.prefetcher import Window
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.tiers.rates import ScoreLists
from telerag_cli.tiers.tier import FastTier, PinResult

POLL_S = 0.002
TRIED_BYTES = 512 << 20
"""Of lists that are scored for a rate, where the arena holds so many; more than processors have cache."""
MISSED = (0.1, 0.5)
"""Shares of the lists of a join that are not in fast memory."""
PARTS = 4
"""They are scored a part at a time."""
LONGEST_S = 60.0


def moving_rates(retriever: Retriever, generator: Generator | None, tokens: int, effort: Effort) -> Moving:
    """Lists moved by lookahead in random orders, alone and beside an LLM that writes; the arena is emptied before and after.

    Args:
        retriever: moves them.
        generator: the LLM; without one, moving beside it is as moving alone.
        tokens: that it writes meanwhile.
        effort: how long.
    """
    alone = [_rate(_move(retriever, effort.seconds)) for _ in range(effort.repeats)]
    if generator is None:
        return Moving(Measured.of(alone), Measured.of(alone), 1.0)
    beside: list[float] = []
    ratios: list[float] = []

    def keep_moving(_begun: threading.Event, ended: threading.Event) -> None:
        # From the beginning of the prompt on, as lookahead does it.
        while not ended.is_set():
            if (window := _move(retriever, LONGEST_S, ended)).bytes_moved:
                beside.append(_rate(window))

    for _ in range(effort.runs):
        plain_s, disturbed_s = (write(generator, tokens).mean_step_s, write(generator, tokens, keep_moving).mean_step_s)
        ratios.append(disturbed_s / plain_s if plain_s else 1.0)
    return Moving(Measured.of(alone), Measured.of(beside or alone), max(1.0, float(np.median(ratios))))


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


def joins_of(retriever: Retriever, queries: FloatArray, nprobe: int) -> Joins:
    """Joins as they are, with all, none and a part of their lists in fast memory; the arena is emptied before and after.

    Args:
        retriever: whose joins.
        queries: (n, dimension); the first warms up.
        nprobe: lists that each probes, or fewer where they would not fit the arena.
    """
    index, tier = retriever.index, retriever.tier
    mean = float(index.list_bytes[index.list_bytes > 0].mean())
    # Twice the mean, because what is near to queries is larger.
    count = max(1, min(nprobe, int(tier.arena_bytes / (2 * mean))))
    few = max(1, count // 8)
    # Nearest first, so a search for fewer lists leaves the farthest to be missed.
    parts = sorted({max(1, count - round(count * share)) for share in MISSED}, reverse=True)

    def join(query: FloatArray, held: int, probed: int = count) -> _Join:
        tier.forget()
        bring(tier, retriever.order(query[None])[:held])
        report = retriever.search(query[None], 5, probed).report
        return _Join(report.join_s, report.bytes_wanted - report.bytes_missed, report.bytes_missed)

    joins = [
        (join(query, 0), join(query, count), join(query, few, few), [join(query, part) for part in parts])
        for query in queries
    ]
    joins = joins[1:] or joins
    tier.forget()
    fixed = [
        little.took_s - little.hit * (every.took_s - little.took_s) / (every.hit - little.hit)
        if every.hit > little.hit
        else 0.0
        for _none, every, little, _parts in joins
    ]
    fixed_s = max(float(np.median(fixed)), 0.0)
    hits = Measured.of([every.hit / _beyond(every, fixed_s) for _none, every, *_rest in joins])
    misses = Measured.of([none.missed / _beyond(none, fixed_s) for none, *_rest in joins])

    def loss_of(place: int) -> LossPoint:
        these = [partly[place] for *_rest, partly in joins]
        losses = [
            overlap_loss(each.hit / max(hits.value, 1.0), each.missed / max(misses.value, 1.0), each.took_s - fixed_s)
            for each in these
        ]
        shares = [each.missed / max(each.hit + each.missed, 1) for each in these]
        return LossPoint(float(np.mean(shares)), float(np.median(losses)))

    return Joins(fixed_s, hits, misses, tuple(loss_of(place) for place in range(len(parts))), retriever.slowdown)


def _beyond(join: _Join, fixed_s: float) -> float:
    """What a join took beside what any takes; never nothing, as it would be by chance where there is little to do."""
    return max(join.took_s - fixed_s, join.took_s / 20, 1e-9)


@dataclass(frozen=True)
class _Join:
    """How long it took, and the bytes in fast memory and not."""

    took_s: float
    hit: int
    missed: int


def scoring_rates(index: Index, tier: FastTier, effort: Effort) -> list[ScoringRate]:
    """Scoring in the arena and, where the tier can, in place; the arena is emptied after."""
    lists = _fitting(index, tier, min(TRIED_BYTES, tier.arena_bytes))
    if not len(lists):
        return []
    pinned = _pinned(tier, lists)
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
    """Have lists in the arena, as many of them as there is room for.

    Raises:
        TeleragError: one could not be moved.
    """
    pinned = _pinned(tier, lists)
    tier.release(np.setdiff1d(lists, pinned.absent).tolist())


def _pinned(tier: FastTier, lists: IntArray) -> PinResult:
    """References to lists that are there by now; raises TeleragError if one could not be moved."""
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


def _fitting(index: Index, tier: FastTier, most_bytes: int) -> IntArray:
    lists = np.random.default_rng(0).permutation(np.flatnonzero(index.list_bytes > 0))
    fits: IntArray = lists[np.cumsum(index.list_bytes[lists]) <= most_bytes]
    return fits if len(fits) else lists[:1]


def _scoring(place: str, score: ScoreLists, index: Index, lists: IntArray, effort: Effort) -> ScoringRate:
    """Rate and latency from two sizes: ``t = latency + n / rate``."""
    query: FloatArray = index.centroids[:1]
    count = max(1, len(lists) // PARTS)
    few = max(1, count // 8)

    def timed(count: int) -> Measured:
        # Others each time: what a processor's cache still has of the last ones would be scored far too quickly.
        turns = itertools.cycle([lists[start : start + count] for start in range(0, len(lists) - count + 1, count)])
        return seconds(lambda: score(query, next(turns)[None], 5), effort)

    all_s, few_s = timed(count), timed(few)
    mean = float(index.list_bytes[lists].mean())
    nbytes, few_bytes = count * mean, few * mean
    if nbytes > few_bytes and all_s.value > few_s.value:
        per_byte_s = (all_s.value - few_s.value) / (nbytes - few_bytes)
        latency_s = max(few_s.value - few_bytes * per_byte_s, 0.0)
    else:
        latency_s = 0.0
    value, low, high = (nbytes / max(took_s - latency_s, 1e-9) for took_s in (all_s.value, all_s.high, all_s.low))
    return ScoringRate(place, index.manifest.storage.value, Measured(value, low, high, all_s.repeats), latency_s)
