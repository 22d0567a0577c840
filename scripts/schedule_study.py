"""What it is worth to run similar queries together, and each where its lists are: the study behind `telerag_cli.scheduling`.

    python scripts/schedule_study.py FOLDER [-o RESULT.json] [--images FOLDER]

FOLDER is that of ``scripts/lookahead_study.py``, and the index is made as there: questions say what will probably be probed, and
the texts generated for them what is probed. Nothing is moved and nothing is timed, except the scheduling itself. An arena is
followed micro-batch by micro-batch: lookahead moves what its questions will probably probe, best ranks first, within a budget;
what is missing then is moved when it is probed. `Arena` does that quickly, with the product's own cache policies and without
fragments; for some questions it is compared with the product's `Residency` and `Plan`, and the script stops if they differ.
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from lookahead_study import make_index
from telerag_cli.bench.plots import INK, MARKERS, PAPER, RULE, SERIES
from telerag_cli.bench_record import record
from telerag_cli.config import PAGE_BYTES, CacheKind, PlacementName
from telerag_cli.files import write_json, writing
from telerag_cli.index.artifact import FloatArray, IntArray
from telerag_cli.lookahead.order import interleave
from telerag_cli.lookahead.plan import Plan
from telerag_cli.scheduling import dispatch, micro_batches
from telerag_cli.scheduling.dispatch import MOST_WAITS, Dispatcher, MicroBatch, ReplicaState
from telerag_cli.scheduling.micro_batches import HORIZON, arrival, greedy, likely, similar
from telerag_cli.scheduling.placement import CacheAware, Offer, Pairs, Placement, make_placement
from telerag_cli.tiers.arena import Arena as Slots
from telerag_cli.tiers.cache import make_policy
from telerag_cli.tiers.residency import BoolArray, Residency

Floats = npt.NDArray[np.float64]

DEPTH = 1024
"""Lists ranked for each question; up to four times those probed."""
REACH = 2
"""How far down its ranks a question is followed, as a multiple of what it probes: as the product does without refinement."""
CACHE_FRACTION = 0.5
BUDGETS = (0.0, 0.125, 0.25, 0.5)
"""Bytes that lookahead may move for a micro-batch, as a multiple of what its questions probe."""
COMPARED = (0.125, 0.25, 0.5)
"""Budgets of the order of arrival at which others are compared with it."""
ARENAS = (1 / 8, 1 / 4, 1 / 2)
"""Sizes of the arena, as shares of the index."""
CHECKED = 1024
"""Questions that are also followed through the product's own accounting."""
TOLERANCE = 0.03
"""Of the quick arena's bytes and hits, for budgets up to `TRUSTED`. With more, lookahead fills the arena, and what cannot be
moved because of fragments is not moved by the product."""
TRUSTED = 0.25
TOPICS = 64
ASKED = 1024
"""Questions of a trace."""
IN_HAND = 2
"""Micro-batches that a replica is given at once: it runs one and prepares for the other."""
LLM_S = 0.5
"""For one question, at the very least."""
HEADLINE = (128, 64, 4, 1 / 4)
"""Lists probed, questions of a batch, questions of a micro-batch, share of the index."""


@dataclass(frozen=True)
class Material:
    """Questions, and the lists nearest to each and to the text generated for it."""

    questions: FloatArray
    predicted: IntArray
    """(n, depth), best first."""
    real: IntArray
    extents: IntArray
    topics: IntArray
    """Of each question, (n,)."""

    def first(self, count: int) -> Material:
        """The same of the first questions only."""
        return replace(self, questions=self.questions[:count], predicted=self.predicted[:count], real=self.real[:count],
                       topics=self.topics[:count])  # fmt: skip

    def probed(self, ranked: IntArray, nprobe: int) -> BoolArray:
        """As masks, (n, nlist)."""
        masks = np.zeros((len(ranked), len(self.extents)), np.bool_)
        np.put_along_axis(masks, ranked[:, :nprobe], True, 1)
        return masks


@dataclass(frozen=True)
class Outcome:
    """Means over questions."""

    bytes: float
    """Moved, as a multiple of those that a question probes."""
    ahead: float
    """Of that, by lookahead."""
    hits: float
    """Share of the probed bytes that was in the arena when it was probed."""


class Arena:
    """Which lists a block of fast memory holds, micro-batch by micro-batch; without fragments."""

    def __init__(self, extents: IntArray, share: float, cache: CacheKind) -> None:
        self.extents = extents.astype(np.float64)
        self.nbytes = share * self.extents.sum()
        self.resident: BoolArray = np.zeros(len(extents), np.bool_)
        self.policy = make_policy(cache, len(extents))

    def run(self, ranked: IntArray, probed: BoolArray, budget: float) -> Floats:
        """Look ahead and join.

        Args:
            ranked: lists that each question will probably probe, best first, (n, reach).
            probed: what they do probe, (n, nlist).
            budget: bytes that lookahead may move.

        Returns:
            Bytes moved ahead, moved late, hit and probed; of the latter two the sum over the questions.
        """
        policy, extents = self.policy, self.extents
        kept = self._new_round()
        ahead = self._look_ahead(interleave(list(ranked)), kept, budget) if budget else 0.0
        hits = (probed & self.resident) @ extents
        union = probed.any(0)
        missed = np.flatnonzero(union & ~self.resident)
        late = extents[missed].sum()
        self._make_room(late, self.resident, policy.heat + 1e9 * union)
        # If they do not fit together, the last ones stay.
        room = self.nbytes - extents[self.resident].sum()
        missed = missed[::-1][np.cumsum(extents[missed[::-1]]) <= room]
        self._admit(missed)
        policy.used(np.flatnonzero(union))
        return np.array([ahead, late, hits.sum(), (probed @ extents).sum()])

    def _new_round(self) -> BoolArray:
        self.policy.new_round()
        kept = np.zeros(len(self.extents), np.bool_)
        hot = np.flatnonzero(self.resident & (self.policy.heat >= self.policy.hot))
        hot = hot[np.argsort(-self.policy.heat[hot], kind="stable")]
        kept[hot[np.cumsum(self.extents[hot]) <= CACHE_FRACTION * self.nbytes]] = True
        return kept

    def _look_ahead(self, order: IntArray, kept: BoolArray, budget: float) -> float:
        extents = self.extents
        rank = np.full(len(extents), len(extents))
        rank[order] = np.arange(len(order))
        wanted = order[~self.resident[order]]
        ends = np.cumsum(extents[wanted])
        # A list may evict what ranks behind it and is not kept.
        movable = np.flatnonzero(self.resident & ~kept)
        movable = movable[np.argsort(rank[movable], kind="stable")]
        behind = np.append(np.cumsum(extents[movable][::-1])[::-1], 0.0)
        room = (
            self.nbytes - extents[self.resident].sum() + behind[np.searchsorted(rank[movable], rank[wanted])]
        )
        possible = (ends <= budget) & (ends <= room)
        count = len(possible) if possible.all() else int(possible.argmin())
        if not count:
            return 0.0
        moved = float(ends[count - 1])
        giving = self.resident & ~kept & (rank > rank[wanted[count - 1]])
        self._make_room(moved, giving, self.policy.heat + 1.0 - rank / len(extents))
        self._admit(wanted[:count])
        return moved

    def _make_room(self, nbytes: float, giving: BoolArray, cost: Floats) -> None:
        short = nbytes - (self.nbytes - self.extents[self.resident].sum())
        if short > 0:
            leaving = np.flatnonzero(giving)
            leaving = leaving[np.argsort(cost[leaving], kind="stable")]
            count = int(np.searchsorted(np.cumsum(self.extents[leaving]), short)) + 1
            self.resident[leaving[:count]] = False

    def _admit(self, lists: IntArray) -> None:
        self.resident[lists] = True
        self.policy.admitted(lists)


class Product:
    """The same by the product's own accounting, list by list."""

    def __init__(self, extents: IntArray, share: float, cache: CacheKind) -> None:
        self.extents = extents
        policy = make_policy(cache, len(extents))
        self.residency = Residency(extents, Slots(int(share * extents.sum())), policy, lambda _list_no: None)

    def run(self, ranked: IntArray, probed: BoolArray, budget: float) -> Floats:
        """As `Arena.run`."""
        residency, extents = self.residency, self.extents
        plan = Plan(extents, residency.new_round(CACHE_FRACTION), int(budget))
        order = interleave(list(ranked))
        plan.reorder(order, len(order))
        ahead = 0
        while budget and (taken := plan.take(residency.state == 0, 1)):
            count = len(residency.reserve(taken, stay=plan.stay(), worth=plan.worth))
            if not count:
                break
            residency.commit(np.array(taken))
            ahead += int(extents[taken].sum())
        resident = residency.state == 2
        union = np.flatnonzero(probed.any(0))
        held = union[resident[union]].tolist()
        residency.hold(held)
        missed = union[~resident[union]].tolist()
        for list_no in missed:
            while not residency.reserve([list_no]):
                # What is scored may leave.
                residency.drop(held)
                held = []
            residency.commit(np.array([list_no]))
            residency.hold([list_no])
            held.append(list_no)
        residency.drop(held)
        residency.policy.used(union)
        hits = ((probed & resident) @ extents).sum()
        return np.array([ahead, extents[missed].sum(), hits, (probed @ extents).sum()], np.float64)


@dataclass(frozen=True)
class Work:
    """What is to be scheduled: some material, and how much of it is probed and put together."""

    material: Material
    nprobe: int
    batch: int
    size: int

    @property
    def count(self) -> int:
        """Questions in whole batches."""
        return len(self.material.questions) // self.batch * self.batch

    def by(self, vectors: FloatArray, how: Callable[[FloatArray, int], list[IntArray]]) -> list[IntArray]:
        """Micro-batches of one batch after the other."""
        starts = range(0, self.count, self.batch)
        return [
            start + places
            for start in starts
            for places in how(vectors[start : start + self.batch], self.size)
        ]

    def going_on(self, vectors: FloatArray) -> list[IntArray]:
        """By `similar`, each batch going on from the one before it."""
        batches: list[IntArray] = []
        for start in range(0, self.count, self.batch):
            before = vectors[np.concatenate(batches[-HORIZON:])] if batches else None
            batches += [
                start + places for places in similar(vectors[start : start + self.batch], self.size, before)
            ]
        return batches

    def likely(self, ranked: IntArray) -> FloatArray:
        """What `similar` compares."""
        return likely(ranked[:, : 4 * self.nprobe], self.nprobe, self.material.extents)


WAYS: dict[str, Callable[[Work], list[IntArray]]] = {
    "arrival": lambda work: work.by(work.material.questions, lambda some, size: arrival(len(some), size)),
    "greedy": lambda work: work.by(work.material.questions, greedy),
    "greedy by lists": lambda work: work.by(work.likely(work.material.predicted), greedy),
    "similar by embeddings": lambda work: work.going_on(work.material.questions),
    "similar, batches apart": lambda work: work.by(work.likely(work.material.predicted), similar),
    "similar": lambda work: work.going_on(work.likely(work.material.predicted)),
    "perfect knowledge": lambda work: work.going_on(work.likely(work.material.real)),
}
FEW = ("arrival", "greedy", "similar", "perfect knowledge")


def follow(arena: Arena | Product, work: Work, batches: Sequence[IntArray], budget: float) -> Outcome:
    """Run micro-batches in this order on one arena."""
    material = work.material
    probed = material.probed(material.real, work.nprobe)
    mean = float((probed @ material.extents).mean())
    total = sum((arena.run(material.predicted[places, : REACH * work.nprobe], probed[places], budget * mean * len(places))
                 for places in batches), np.zeros(4))  # fmt: skip
    asked = mean * sum(map(len, batches))
    return Outcome((total[0] + total[1]) / asked, total[0] / asked, total[2] / total[3])


def floor(work: Work, share: float) -> float:
    """Bytes that no grouping and no order of the questions of a batch can do without, as a multiple of those probed.

    What a batch probes and an arena full of it does not hold must be moved, if only once.
    """
    probed = work.material.probed(work.material.real, work.nprobe)[: work.count]
    extents = work.material.extents
    unions = [
        float(extents[probed[start : start + work.batch].any(0)].sum())
        for start in range(0, work.count, work.batch)
    ]
    held = share * float(extents.sum())
    return sum(max(0.0, union - held) for union in unions) / float((probed @ extents).sum())


@dataclass(frozen=True)
class Batches:
    """A row of the first table."""

    nprobe: int
    batch: int
    size: int
    share: float
    cache: CacheKind
    ways: tuple[str, ...]
    fading: float = micro_batches.FADING
    exact: bool = False
    """Follow some of the questions through the product's accounting too."""


@contextmanager
def setting(module: ModuleType, name: str, value: float) -> Iterator[None]:
    """Another value for one of the product's numbers."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def run_batches(row: Batches, material: Material) -> dict[str, Any]:
    """Curves of all ways to put questions together, and what they save."""
    if row.exact:
        material = material.first(CHECKED)
    work = Work(material, row.nprobe, row.batch, row.size)
    with setting(micro_batches, "FADING", row.fading):
        orders = {name: WAYS[name](work) for name in row.ways}
    for batches in orders.values():
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(work.count))
    result = {"nprobe": row.nprobe, "batch": row.batch, "micro_batch": row.size, "arena": row.share, "cache": row.cache.value,
              "fading": row.fading, "questions": work.count, **run_orders(row, work, orders, Arena)}  # fmt: skip
    if row.exact:
        result["by_the_product"] = run_orders(row, work, orders, Product)
    return result


def run_orders(
    row: Batches, work: Work, orders: dict[str, list[IntArray]], kind: type[Arena | Product]
) -> dict[str, Any]:
    """Curves over the budgets, and what they save."""
    extents = work.material.extents
    curves = {name: [follow(kind(extents, row.share, row.cache), work, batches, budget) for budget in BUDGETS]
              for name, batches in orders.items()}  # fmt: skip
    against = {name: {str(budget): compare(curves["arrival"][BUDGETS.index(budget)], curve) for budget in COMPARED}
               for name, curve in curves.items() if name != "arrival"}  # fmt: skip
    rounded = {name: [{key: round(value, 4) for key, value in asdict(each).items()} for each in curve]
               for name, curve in curves.items()}  # fmt: skip
    return {"curves": rounded, "against_arrival": against, "floor": round(floor(work, row.share), 4)}


def compare(base: Outcome, curve: Sequence[Outcome]) -> dict[str, float | None]:
    """Share of the bytes saved at the hit rate of ``base``, and hits gained at its bytes; None where the curve does not reach."""
    moved = np.array([each.bytes for each in curve])
    hits = np.array([each.hits for each in curve])
    rising = np.append(True, np.diff(hits) > 0) & (hits >= np.maximum.accumulate(hits))
    saved = None
    if base.hits <= hits.max():
        # With less than the smallest budget it would be fewer hits and fewer bytes: there is no such budget.
        saved = round(1 - float(np.interp(base.hits, hits[rising], moved[rising])) / base.bytes, 4)
    gained = (
        None if base.bytes < moved.min() else round(float(np.interp(base.bytes, moved, hits)) - base.hits, 4)
    )
    return {"bytes_saved": saved, "hits_gained": gained}


@dataclass(frozen=True)
class Fleet:
    """A row of the second table."""

    nprobe: int
    replicas: int
    exponent: float
    seed: int
    share: float = 1 / 4
    batch: int = 256
    size: int = 4
    cache: CacheKind = CacheKind.HOTNESS
    way: str = "similar"
    budget: float = 0.0
    looked_at: int = dispatch.LOOKED_AT
    variants: bool = False
    """Of cache-aware too."""


class FreeOnly(CacheAware):
    """Only what is free is looked at: what suits a busy one better is given away."""

    def choose(self, offer: Offer) -> Pairs:
        """The best assignment now."""
        return self.at_once(offer)


class SharesMost(CacheAware):
    """A replica takes of its share what it would move the least for."""

    def next_of(self, share: IntArray, to_move: Floats) -> int:
        """Instead of the oldest."""
        return int(share[to_move[share].argmin()])


PLACEMENTS: dict[str, Callable[[], Placement]] = {name.value: partial(make_placement, name) for name in PlacementName}  # fmt: skip
VARIANTS: dict[str, Callable[[], Placement]] = {"free only": FreeOnly, "shares most": SharesMost}


def draw_trace(row: Fleet, topics: IntArray) -> IntArray:
    """Questions: a topic by Zipf's law, the most frequent one drawn too, and any of its questions, again and again."""
    random = np.random.default_rng(row.seed)
    chance = 1 / np.arange(1, TOPICS + 1) ** row.exponent
    drawn = random.permutation(TOPICS)[random.choice(TOPICS, ASKED, p=chance / chance.sum())]
    return np.array([random.choice(np.flatnonzero(topics == topic)) for topic in drawn])


def run_fleet(row: Fleet, material: Material) -> dict[str, Any]:
    """The same micro-batches in the same order by each placement."""
    asked = draw_trace(row, material.topics)
    some = Material(
        material.questions[asked], material.predicted[asked], material.real[asked], material.extents, asked
    )
    work = Work(some, row.nprobe, row.batch, row.size)
    batches = WAYS[row.way](work)
    tried = PLACEMENTS | VARIANTS if row.variants else PLACEMENTS
    with setting(dispatch, "LOOKED_AT", row.looked_at):
        found = {name: place(row, work, batches, placement()) for name, placement in tried.items()}
    return {**asdict(row), "placements": found}


@dataclass(eq=False)
class Replica:
    """What runs micro-batches, and what the dispatcher knows of it."""

    arena: Arena
    said: BoolArray
    """Lists that it had when it began with the micro-batch that it runs."""
    in_hand: list[MicroBatch] = field(default_factory=list)
    busy_s: float = 0.0
    answered: int = 0


def place(row: Fleet, work: Work, batches: Sequence[IntArray], placement: Placement) -> dict[str, float]:
    """Let replicas take micro-batches as they get free, and say what they find.

    A micro-batch takes a second for each of its questions, more or less, and a fortieth of one for what a question probes if
    that is moved. A replica says what it has when it begins with a micro-batch.
    """
    material = work.material
    random = np.random.default_rng([row.seed, 1])
    probed = material.probed(material.real, row.nprobe)
    expected = material.probed(material.predicted, row.nprobe)
    mean = float((probed @ material.extents).mean())
    replicas = [Replica(Arena(material.extents, row.share, row.cache), np.zeros(len(material.extents), np.bool_))
                for _ in range(row.replicas)]  # fmt: skip
    queue = Dispatcher(material.extents, placement)
    waiting = [MicroBatch(number, tuple(places.tolist()), np.logical_or.reduce(expected[places]))
               for number, places in enumerate(batches)]  # fmt: skip
    total: Floats = np.zeros(4)
    ends: list[tuple[float, int]] = []
    order: list[int] = []
    assigning_s = now_s = 0.0

    def begin(number: int) -> None:
        nonlocal total
        replica = replicas[number]
        places = list(replica.in_hand[0].members)
        replica.said = replica.arena.resident.copy()
        ranked = material.predicted[places, : REACH * row.nprobe]
        result = replica.arena.run(ranked, probed[places], row.budget * mean * len(places))
        total = total + result
        per_question_s = max(0.25, 1 + 0.25 * random.standard_normal())
        lasts_s = len(places) * per_question_s + 0.025 * (result[0] + result[1]) / mean
        replica.busy_s += lasts_s
        replica.answered += len(places)
        heapq.heappush(ends, (now_s + lasts_s, number))

    while True:
        # Whole batches come in, so that there is always something to choose from.
        per_batch = row.batch // row.size
        while waiting and queue.waiting < per_batch:
            queue.add(waiting[:per_batch])
            del waiting[:per_batch]
        states = [ReplicaState(number, IN_HAND - len(each.in_hand), each.said, tuple(each.in_hand))
                  for number, each in enumerate(replicas)]  # fmt: skip
        began_s = time.perf_counter()
        given = queue.assign(states)
        assigning_s += time.perf_counter() - began_s
        for number, batch in given:
            replicas[number].in_hand.append(batch)
            order.append(batch.number)
            if len(replicas[number].in_hand) == 1:
                begin(number)
        if not ends:
            break
        now_s, number = heapq.heappop(ends)
        replicas[number].in_hand.pop(0)
        if replicas[number].in_hand:
            begin(number)
    assert sorted(order) == list(range(len(batches)))
    answered, busy_s = ([getattr(each, what) for each in replicas] for what in ("answered", "busy_s"))
    return {"hits": round(total[2] / total[3], 4), "bytes": round((total[0] + total[1]) / mean / sum(answered), 4),
            "questions_imbalance": round(max(answered) / float(np.mean(answered)), 4),
            "busy_imbalance": round(max(busy_s) / float(np.mean(busy_s)), 4),
            "ends_after": round(now_s / float(np.mean(busy_s)), 4),
            "most_passed_over": max(place - number for place, number in enumerate(order)),
            "assign_ms": round(1000 * assigning_s / len(batches), 3)}  # fmt: skip


def check(row: dict[str, Any]) -> None:
    """Stop the script if the quick arena does not move and hit what the product's accounting does."""
    for name, curve in row["curves"].items():
        for budget, quick, exact in zip(BUDGETS, curve, row["by_the_product"]["curves"][name], strict=True):
            far = max(abs(quick[key] - exact[key]) for key in ("bytes", "hits"))
            if budget <= TRUSTED and far > TOLERANCE:
                sys.exit(
                    f"By {name} with a budget of {budget} this study finds {quick} and the product {exact}."
                )


def time_scheduling(material: Material) -> list[dict[str, float]]:
    """How long it takes to put a batch together, beside what an LLM takes for it."""
    rows = []
    for batch, size in ((64, 4), (256, 4), (1024, 8)):
        count = min(batch, len(material.questions))
        ranked = material.predicted[:count, :512]
        took_s = []
        for _ in range(5):
            began_s = time.perf_counter()
            similar(likely(ranked, 128, material.extents), size)
            took_s.append(time.perf_counter() - began_s)
        rows.append({"batch": count, "micro_batch": size, "ms": round(1000 * min(took_s), 2),
                     "share_of_llm": round(min(took_s) / (count * LLM_S), 6)})  # fmt: skip
    return rows


def load(folder: Path, nlist: int, copies: int, noise: float, seed: int) -> Material:
    """Make the index and rank its lists for all questions."""
    background = np.load(folder / "background.npy").astype(np.float32)
    coarse, extents, _centroids = make_index(background, nlist, copies, noise, seed)
    held = np.load(folder / "embeddings.npz")
    questions, texts = (held[name].astype(np.float32) for name in ("question", "generated_100"))
    depth = min(DEPTH, nlist)
    predicted, real = (coarse.probe(vectors, depth)[1] for vectors in (questions, texts))
    kmeans = faiss.Kmeans(
        questions.shape[1], TOPICS, niter=15, seed=seed, spherical=True, min_points_per_centroid=1
    )
    kmeans.train(questions)
    topics = kmeans.index.search(questions, 1)[1][:, 0]
    return Material(questions, predicted, real, extents.astype(np.int64) // PAGE_BYTES * PAGE_BYTES, topics)


_material: Material | None = None
"""Of a process that works for this one."""


def _receive(material: Material) -> None:
    global _material
    _material = material


def _work(row: Batches | Fleet) -> dict[str, Any]:
    assert _material is not None
    return run_batches(row, _material) if isinstance(row, Batches) else run_fleet(row, _material)


def work_through(
    rows: Sequence[Batches | Fleet], material: Material, processes: int
) -> Iterator[dict[str, Any]]:
    """The results of the rows, in order."""
    # Spawned, because a forked process would inherit Faiss's threads without the threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _receive, (material,)) as pool:
        yield from pool.map(_work, rows)


def batch_rows() -> list[Batches]:
    """The first table: all ways for batches of 64, fewer ways for other sizes, and another cache."""
    cache = CacheKind.HOTNESS
    rows = [Batches(128, 64, 4, 1 / 4, cache, ("arrival", "greedy", "similar"), exact=True)]
    rows += [Batches(nprobe, 64, 4, share, cache, tuple(WAYS) if nprobe == 128 else FEW)
            for nprobe, share in product((128, 32, 256), ARENAS)]  # fmt: skip
    rows += [Batches(128, batch, size, 1 / 4, cache, FEW)
             for batch, size in ((64, 8), (64, 16), (256, 4), (256, 8), (256, 16), (1024, 4), (1024, 8), (1024, 16))]  # fmt: skip
    rows += [Batches(128, 64, 4, share, CacheKind.FREQUENCY, FEW) for share in ARENAS]
    return rows + [
        Batches(128, 64, 4, 1 / 4, cache, ("arrival", "similar"), fading) for fading in (0.35, 0.5, 0.8, 0.9)
    ]


def fleet_rows() -> list[Fleet]:
    """The second table; then the same with lookahead, without micro-batches of similar questions, and with other placements."""
    rows = [Fleet(nprobe, replicas, exponent, seed) for nprobe, replicas, exponent, seed
            in product((128, 32), (4, 2, 8), (0.8, 1.0, 1.2), (1, 2, 3))]  # fmt: skip
    few = tuple(product((128, 32), (1, 2, 3)))
    rows += [Fleet(nprobe, 4, 1.0, seed, budget=0.25) for nprobe, seed in few]
    rows += [Fleet(nprobe, 4, 1.0, seed, way="arrival") for nprobe, seed in few]
    rows += [Fleet(nprobe, 4, 1.0, seed, variants=True) for nprobe, seed in few]
    return rows + [
        Fleet(nprobe, 4, 1.0, seed, looked_at=count) for count in (2, 4, 8) for nprobe, seed in few
    ]


def ratios(fleets: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Hits of cache-aware over those of the others, by all but exponent and seed: the mean, and the least of any cell."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in fleets:
        name = f"nprobe {row['nprobe']}, {row['replicas']} replicas"
        name += f", budget {row['budget']}" if row["budget"] else ""
        name += ", order of arrival" if row["way"] == "arrival" else ""
        name += ", variants" if row["variants"] else ""
        name += f", {row['looked_at']} looked at" if row["looked_at"] != dispatch.LOOKED_AT else ""
        groups.setdefault(name, []).append(row["placements"])
    table = {}
    for name, cells in groups.items():
        over = {other: [cell[PlacementName.CACHE_AWARE]["hits"] / cell[other]["hits"] for cell in cells]
                for other in (PlacementName.ROUND_ROBIN, PlacementName.GREEDY)}  # fmt: skip
        table[name] = {
            **{f"hits, {each}": round(float(np.mean([cell[each]["hits"] for cell in cells])), 3) for each in cells[0]},
            **{f"bytes, {each}": round(float(np.mean([cell[each]["bytes"] for cell in cells])), 3) for each in PlacementName},
            **{f"{stat} over {other}": round(float(of(values)), 3)
               for other, values in over.items() for stat, of in (("mean", np.mean), ("least", np.min))},
            **{f"worst imbalance, {each}": max(cell[each]["questions_imbalance"] for cell in cells) for each in PlacementName},
            "most passed over": max(cell[PlacementName.CACHE_AWARE]["most_passed_over"] for cell in cells)}  # fmt: skip
    return table


# Figures

COLOURS = {
    name: SERIES[slot][0] for slot, name in enumerate(("arrival", "greedy", "similar", "perfect knowledge"))
}
LABELS = {"arrival": "order of arrival", "greedy": "the paper's greedy", "similar": "similar (telerag)",
          "perfect knowledge": "similar, knowing what will be probed"}  # fmt: skip


def draw_batches(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Hits against bytes moved, one panel for each arena."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(rows), figsize=(3.7 * len(rows), 4.3), layout="constrained", facecolor=PAPER
    )
    for axis, row in zip(np.atleast_1d(axes), rows, strict=True):
        for slot, name in enumerate(FEW):
            curve = row["curves"][name]
            axis.plot([each["bytes"] for each in curve], [100 * each["hits"] for each in curve], color=COLOURS[name],
                      marker=MARKERS[slot][0], markersize=5, label=LABELS[name])  # fmt: skip
        _dress(
            axis,
            f"arena of {row['arena']:.3g} of the index",
            "bytes moved a question,\nas a multiple of those probed",
        )
    np.atleast_1d(axes)[0].set_ylabel("hits (% of the probed bytes)", color=INK)
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def draw_fleets(path: Path, fleets: Sequence[dict[str, Any]]) -> None:
    """Hits of the placements over replicas, a panel for what is probed; means over seeds and exponents."""
    from matplotlib import pyplot

    probes = sorted({row["nprobe"] for row in fleets})
    figure, axes = pyplot.subplots(
        1, len(probes), figsize=(4.4 * len(probes), 4.1), layout="constrained", facecolor=PAPER
    )
    names = (PlacementName.ROUND_ROBIN, PlacementName.GREEDY, PlacementName.CACHE_AWARE)
    for axis, nprobe in zip(np.atleast_1d(axes), probes, strict=True):
        counts = sorted({row["replicas"] for row in fleets})
        for slot, name in enumerate(names):
            hits = [100 * np.mean([row["placements"][name]["hits"] for row in fleets
                                   if (row["nprobe"], row["replicas"]) == (nprobe, count)]) for count in counts]  # fmt: skip
            bars = axis.bar(
                np.arange(len(counts)) + 0.27 * (slot - 1), hits, 0.25, color=SERIES[slot][0], label=name
            )
            axis.bar_label(bars, fmt="%.0f", fontsize=9, color=INK)
        axis.set_xticks(range(len(counts)), [str(count) for count in counts])
        _dress(axis, f"{nprobe} lists probed", "replicas")
    np.atleast_1d(axes)[0].set_ylabel("hits, nothing moved ahead (%)", color=INK)
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def _dress(axis: Any, title: str, across: str) -> None:
    axis.set_facecolor(PAPER)
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    axis.set_xlabel(across, color=INK)
    axis.grid(visible=True, axis="y", color=RULE, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=144)
    pyplot.close(figure)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nlist", type=int, default=2048)
    parser.add_argument("--copies", type=int, default=7, help="noisy copies of the background in the index")
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--images", type=Path, help="draw figures into this folder")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()

    material = load(options.folder, options.nlist, options.copies, options.noise, options.seed)
    costs = time_scheduling(material)
    print("cost", costs)
    rows: list[Batches | Fleet] = [*batch_rows(), *fleet_rows()]
    found = list(work_through(rows, material, options.processes))
    exact = next(row for row in found if "by_the_product" in row)
    check(exact)
    tables = [row for row in found if "curves" in row and row is not exact]
    fleets = [row for row in found if "placements" in row]
    for row in tables:
        show(row)
    show({**exact, **exact["by_the_product"]}, "by the product")
    placed = ratios(fleets)
    for name, ratio in placed.items():
        print(name, ratio)
    if options.images:
        import matplotlib

        matplotlib.use("Agg")
        options.images.mkdir(parents=True, exist_ok=True)
        shown = [row for row in tables if len(row["curves"]) == len(WAYS)]
        draw_batches(options.images / "scheduling-batches.png", shown)
        first = next(index for index, row in enumerate(fleet_rows()) if row.budget)
        draw_fleets(options.images / "scheduling-replicas.png", fleets[:first])
    if options.output:
        result = record(
            shlex.join(["python", *sys.argv]), questions=len(material.questions), nlist=options.nlist, copies=options.copies,
            noise=options.noise, seed=options.seed, reach=REACH, budgets=BUDGETS, cache_fraction=CACHE_FRACTION, topics=TOPICS,
            asked=ASKED, in_hand=IN_HAND, most_waits=MOST_WAITS, cost=costs, by_the_product=exact, micro_batches=tables,
            replicas=fleets, replicas_summary=placed, figures=headlines(tables, placed, costs))  # fmt: skip
        write_json(options.output, result)


def show(row: dict[str, Any], accounting: str = "") -> None:
    """Print a row of the first table."""
    settings = ", ".join(
        f"{key} {row[key]}" for key in ("nprobe", "batch", "micro_batch", "arena", "cache", "fading")
    )
    print(f"{settings}, floor {row['floor']} {accounting}")
    for name, curve in row["curves"].items():
        saved = "  ".join(
            f"{budget}: {_percent(each['bytes_saved'])} % fewer bytes, {_percent(each['hits_gained'])} points more hits"
            for budget, each in row["against_arrival"].get(name, {}).items()
        )
        print(f"  {name:24}", *(f"{each['bytes']:.2f}/{each['hits']:.3f}" for each in curve), saved)


def _percent(share: float | None) -> str:
    return "   -" if share is None else f"{100 * share:4.0f}"


def headlines(
    tables: Sequence[dict[str, Any]], placed: dict[str, dict[str, float]], costs: Sequence[dict[str, float]]
) -> list[dict[str, str]]:
    """What a reader should see first."""
    nprobe, batch, size, share = HEADLINE
    row = next(
        row for row in tables if (row["nprobe"], row["batch"], row["micro_batch"], row["arena"]) == HEADLINE
    )
    of = f"{batch} questions by {size}, {nprobe} lists probed, an arena of {share} of the index"
    ours, paper = (row["against_arrival"][name]["0.25"] for name in ("similar", "greedy"))
    fewer, more = (_percent(ours[key]).strip() for key in ("bytes_saved", "hits_gained"))
    papers = _percent(paper["bytes_saved"]).strip()
    four = [f"{placed[f'nprobe {lists}, 4 replicas'][f'mean over {PlacementName.ROUND_ROBIN}']:.2f} x ({lists} lists probed)"
            for lists in (128, 32)]  # fmt: skip
    return [
        {"what": f"Bytes moved a question at the hit rate of the order of arrival ({of})",
         "value": f"{fewer} % fewer, or {more} points more hits at equal bytes",
         "goal": "25 % fewer, or 8 points more", "against": f"{papers} % fewer with the paper's greedy"},
        {"what": "Hits of cache-aware placement on 4 replicas, the same micro-batches in the same order",
         "value": " and ".join(four), "goal": "1.15 x", "against": "round-robin"},
        {"what": "Time to put together a batch of 64", "value": f"{costs[0]['ms']:.1f} ms",
         "goal": "nothing beside the LLM", "against": f"{64 * LLM_S:.0f} s of an LLM that takes {LLM_S} s a question"},
    ]  # fmt: skip


if __name__ == "__main__":
    main()
