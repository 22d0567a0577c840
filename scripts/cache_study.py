"""Which lists should stay in fast memory between questions: the study behind `telerag_cli.tiers.cache`.

    python scripts/cache_study.py FOLDER [-o RESULT.json] [--images FOLDER]

FOLDER holds ``trace.jsonl`` and ``embeddings.npz`` (arrays ``question``, ``generated_50`` and ``generated_100``: the embeddings of
each question, of the first half of the text generated for it, and of the whole text) and ``background.npy`` (other real
embeddings, for the index). The real query is the whole text; lookahead is by the question. Nothing is timed: each policy
is driven through the product's own accounting (`Residency`, `Arena`, `Plan`), and hits and bytes are counted.

A cell is a trace, a share of the index that the arena holds, a number of lists probed, and a budget of lookahead. In each, all
policies have the same questions. The first quarter of a trace fills the arena and is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from lookahead_study import COLOURS, make_index
from telerag_cli.config import CacheKind
from telerag_cli.files import write_json, writing
from telerag_cli.index.artifact import FloatArray, IntArray
from telerag_cli.lookahead.order import blend
from telerag_cli.lookahead.plan import Plan
from telerag_cli.tiers.arena import Arena
from telerag_cli.tiers.cache import CachePolicy, Frequency, Heat, LeastRecentlyUsed, make_policy
from telerag_cli.tiers.residency import ABSENT, Residency

Floats = npt.NDArray[np.float64]

TRACES = ("recorded", "zipf 0.6", "zipf 1.0", "zipf 1.4", "topics", "bursts", "drift")
ARENAS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
PROBES = (32, 128)
BUDGETS = (0.5, 1.0)
TOPICS = 64
STAY = 0.8
"""In bursts, the probability that the next question is on the same topic."""
DRIFTS = 4
"""In the drifting trace, the number of parts, in each of which other topics are frequent."""
WARM_UP = 0.25
REACH = 2
"""Lookahead by the question goes so far down its order, as a multiple of the lists probed: `lookahead.order.reach`."""
DEPTH = 16
"""Lists that a link is given at once."""
DECAYS = (0.9, 0.95, 0.98, 0.99)
HOTNESS = CacheKind.HOTNESS.value
CHOSEN = CacheKind.FREQUENCY.value
BOUND = "farthest next use"
QUESTION, HALF = "question", "half of the text"


class Counted:
    """Heat counts uses and fades; with all that a candidate may do otherwise than `Frequency`."""

    keeps = True

    def __init__(self, extents: IntArray, *, decay: float = Frequency.decay, base: float = 0.0, hot: float = np.inf,
                 scale: float = 1.0, power: float = 0.0) -> None:  # fmt: skip
        """Begin.

        Args:
            extents: bytes of each list, (nlist,).
            decay: what is left of the heat after a round.
            base: heat of a list that has been moved and never used.
            hot: heat from which lookahead may not evict a list.
            scale: what a use is worth beside a place in lookahead's order.
            power: a use is worth the list's bytes, in units of their mean, to this power.
        """
        self.heat: Heat = np.zeros(len(extents))
        self.hot = hot
        self._decay, self._base = decay, base
        self._worth = scale * (np.maximum(extents, 1) / extents.mean()) ** power

    def admitted(self, lists: IntArray) -> None:
        """Begin at the base."""
        self.heat[lists] = np.maximum(self.heat[lists], self._base)

    def used(self, lists: IntArray) -> None:
        """Raise."""
        self.heat[lists] += self._worth[lists]

    def new_round(self) -> None:
        """Fade."""
        self.heat *= self._decay


class UsedLeastRecently(LeastRecentlyUsed):
    """Moving in is no use: what was moved in vain is as old as its last use."""

    def admitted(self, lists: IntArray) -> None:
        """Nothing."""


Candidates = dict[str, tuple[Callable[[IntArray], CachePolicy], float]]
"""By name: a policy for lists of so many bytes, and the cache fraction that it runs with."""


def candidates() -> Candidates:
    """All that are compared."""
    found: Candidates = {kind.value: (partial(_product, kind), 0.5) for kind in CacheKind}
    for fraction in (0.0, 1.0):
        found[f"{HOTNESS}, fraction {fraction:g}"] = (partial(_product, CacheKind.HOTNESS), fraction)
    found["lru by use"] = (lambda extents: UsedLeastRecently(len(extents)), 0.0)
    found["hotness, nothing for arriving"] = (partial(Counted, decay=0.5, hot=0.7), 0.5)
    found.update(
        {
            f"decay {decay}": (partial(Counted, decay=decay), 0.0)
            for decay in DECAYS
            if decay != Frequency.decay
        }
    )
    found["frequency, kept half"] = (partial(Counted, hot=0.7), 0.5)
    found["frequency, base 0.25"] = (partial(Counted, base=0.25), 0.0)
    found["frequency, uses worth 0.3"] = (partial(Counted, scale=0.3), 0.0)
    found["frequency by byte"] = (partial(Counted, power=-1.0), 0.0)
    found["frequency times bytes"] = (partial(Counted, power=1.0), 0.0)
    return found


def _product(kind: CacheKind, extents: IntArray) -> CachePolicy:
    return make_policy(kind, len(extents))


@dataclass(frozen=True)
class Cell:
    """One place of the comparison."""

    trace: str
    arena: float
    """Share of the index."""
    nprobe: int
    budget: float
    """Bytes that lookahead may move, as a multiple of those probed."""
    seed: int
    predicted: str = QUESTION
    """What lookahead is by."""


@dataclass(frozen=True)
class Counts:
    """Of each question that is counted, shape (n,)."""

    wanted: Floats
    hits: Floats
    wanted_bytes: Floats
    hit_bytes: Floats
    ahead_bytes: Floats
    """Moved by lookahead."""

    @property
    def hit_share(self) -> float:
        """Of the probed lists, those there at the join."""
        return float(self.hits.sum() / self.wanted.sum())

    @property
    def hit_share_bytes(self) -> float:
        """The same of bytes."""
        return float(self.hit_bytes.sum() / self.wanted_bytes.sum())

    @property
    def moved(self) -> float:
        """Bytes over the link, ahead and at the join, as a multiple of those probed."""
        missed = self.wanted_bytes.sum() - self.hit_bytes.sum()
        return float((self.ahead_bytes.sum() + missed) / self.wanted_bytes.sum())


@dataclass(frozen=True)
class Store:
    """An index and the questions to it."""

    extents: IntArray
    orders: dict[str, npt.NDArray[np.int16]]
    """By what predicts: for each question its lists, best first, (questions, nlist)."""
    best: npt.NDArray[np.int16]
    """For each question's real query, (questions, most lists probed)."""
    topic: IntArray
    """Of each question."""

    def probes(self, nprobe: int) -> IntArray:
        """What each question probes, in ascending order, (questions, nprobe)."""
        lists: IntArray = np.sort(self.best[:, :nprobe].astype(np.int64), axis=1)
        return lists


def replay(extents: IntArray, policy: CachePolicy, fraction: float, orders: Sequence[IntArray], probes: Sequence[IntArray],
           arena_bytes: int, budget: float, first: int = 0) -> Counts:  # fmt: skip
    """Rounds of lookahead and joins, one after the other, over one arena.

    Args:
        extents: bytes of each list, (nlist,).
        policy: what is evicted first.
        fraction: share of the arena that hot lists may hold.
        orders: for each round its lists, best first, and as far as lookahead goes down them in the first place.
        probes: for each round the distinct lists that are probed.
        arena_bytes: the arena's size.
        budget: bytes that lookahead may move, as a multiple of those probed.
        first: round from which on is counted.
    """
    residency = Residency(extents, Arena(arena_bytes), policy, lambda _list_no: None)
    rows = []
    for order, wanted in zip(orders, probes, strict=True):
        kept = residency.new_round(fraction)
        wanted_bytes = int(extents[wanted].sum())
        plan = Plan(extents, kept, round(budget * wanted_bytes))
        plan.reorder(order, REACH * len(wanted))
        ahead_bytes = 0
        while lists := plan.take(residency.state == ABSENT, DEPTH):
            offsets = residency.reserve(lists, stay=plan.stay(), worth=plan.worth)
            moved = np.array(lists[: len(offsets)], np.int64)
            residency.commit(moved)
            ahead_bytes += int(extents[moved].sum())
            if len(offsets) < len(lists):
                plan.end()
        there = residency.state[wanted] != ABSENT
        hits = wanted[there]
        rows.append((len(wanted), len(hits), wanted_bytes, int(extents[hits].sum()), ahead_bytes))
        _join(residency, hits.tolist(), wanted[~there].tolist())
        policy.used(wanted)
    return Counts(*np.array(rows[first:], np.float64).T)


def _join(residency: Residency, held: list[int], absent: list[int]) -> None:
    """Move what is absent; what has been scored makes room for what found none."""
    residency.hold(held)
    while absent:
        started = absent[: len(residency.reserve(absent))]
        residency.commit(np.array(started, np.int64))
        residency.hold(started)
        held, absent = held + started, absent[len(started) :]
        if absent:
            residency.drop(held)
            held = []
    residency.drop(held)


def bound(extents: IntArray, orders: Sequence[IntArray], probes: Sequence[IntArray], arena_bytes: int, budget: float,
          first: int = 0) -> Counts:  # fmt: skip
    """What an arena holds that knows the future: after each round the lists with the nearest next use, as many as fit.

    Lookahead needs no room in it, and no list a place, so nothing is lost to either. For lists of different sizes the farthest next
    use is not quite the best choice; no policy here comes near it.
    """
    rounds, nlist = len(probes), len(extents)
    next_use = np.full((rounds + 1, nlist), rounds + 1, np.int32)
    for number in range(rounds - 1, -1, -1):
        next_use[number] = next_use[number + 1]
        next_use[number, probes[number]] = number
    held = np.zeros(nlist, np.bool_)
    rows = []
    for number, (order, wanted) in enumerate(zip(orders, probes, strict=True)):
        wanted_bytes = int(extents[wanted].sum())
        likely = order[: REACH * len(wanted)]
        likely = likely[~held[likely]]
        moved = likely[np.cumsum(extents[likely]) <= budget * wanted_bytes]
        held[moved] = True
        hits = wanted[held[wanted]]
        rows.append(
            (len(wanted), len(hits), wanted_bytes, int(extents[hits].sum()), int(extents[moved].sum()))
        )
        held[wanted] = True
        lists = np.flatnonzero(held)
        lists = lists[np.argsort(next_use[number + 1][lists], kind="stable")]
        held[:] = False
        held[lists[np.cumsum(extents[lists]) <= arena_bytes]] = True
    return Counts(*np.array(rows[first:], np.float64).T)


def trace(name: str, topic: IntArray, count: int, seed: int) -> IntArray:
    """Numbers of the questions, in the order in which they are asked, (count,).

    Args:
        name: one of `TRACES`: a stretch of the recording; questions drawn by Zipf's law; topics drawn by it, and any question of
            them; runs of questions on one topic; topics by Zipf's law, other ones being frequent after a while.
        topic: of each question.
        count: how many.
        seed: of the draw.
    """
    total, random = len(topic), np.random.default_rng(seed)

    def of_topic(number: int) -> int:
        return int(random.choice(np.flatnonzero(topic == number)))

    def zipf(size: int, exponent: float, draws: int) -> IntArray:
        weights = np.arange(1, size + 1) ** -exponent
        drawn: IntArray = random.permutation(size)[random.choice(size, draws, p=weights / weights.sum())]
        return drawn

    kinds = np.unique(topic)
    match name.split():
        case ["recorded"]:
            return np.arange(seed * count, (seed + 1) * count) % total
        case ["zipf", exponent]:
            return zipf(total, float(exponent), count)
        case ["topics"]:
            return np.array([of_topic(kinds[number]) for number in zipf(len(kinds), 1.0, count)])
        case ["bursts"]:
            asked: list[int] = []
            now = 0
            for _ in range(count):
                now = now if asked and random.random() < STAY else int(random.choice(kinds))
                asked.append(of_topic(now))
            return np.array(asked)
        case ["drift"]:
            part = -(-count // DRIFTS)
            drawn = [of_topic(kinds[number]) for _ in range(DRIFTS) for number in zipf(len(kinds), 1.0, part)]
            return np.array(drawn[:count])
    raise ValueError(name)


def measure(store: Store, questions: int, cell: Cell) -> dict[str, Counts]:
    """All candidates and the bound, over the same questions."""
    asked = trace(cell.trace, store.topic, questions, cell.seed)
    probes = list(store.probes(cell.nprobe)[asked])
    orders = list(store.orders[cell.predicted][asked].astype(np.int64))
    arena_bytes, first = int(cell.arena * store.extents.sum()), round(WARM_UP * questions)
    found = {
        name: replay(
            store.extents, make(store.extents), fraction, orders, probes, arena_bytes, cell.budget, first
        )
        for name, (make, fraction) in candidates().items()
    }
    found[BOUND] = bound(store.extents, orders, probes, arena_bytes, cell.budget, first)
    return found


def load(folder: Path, nlist: int, copies: int, noise: float, seed: int) -> Store:
    """Make the index and rank its lists for all questions."""
    background = np.load(folder / "background.npy").astype(np.float32)
    _coarse, extents, centroids = make_index(background, nlist, copies, noise, seed)
    held = np.load(folder / "embeddings.npz")
    question, half, whole = (
        held[name].astype(np.float32) for name in ("question", "generated_50", "generated_100")
    )
    blended = np.stack([blend(one, other, 0.5) for one, other in zip(question, half, strict=True)])
    topics = faiss.Kmeans(question.shape[1], TOPICS, niter=10, seed=seed, spherical=True)
    topics.train(question)
    _scores, topic = topics.index.search(question, 1)
    orders = {QUESTION: _ranked(question, centroids), HALF: _ranked(blended, centroids)}
    return Store(extents.astype(np.int64), orders, _ranked(whole, centroids)[:, : max(PROBES)], topic[:, 0])


def _ranked(queries: FloatArray, centroids: FloatArray) -> npt.NDArray[np.int16]:
    order: npt.NDArray[np.int16] = np.argsort(-(queries @ centroids.T), axis=1, kind="stable").astype(
        np.int16
    )
    return order


Found = dict[Cell, dict[str, Counts]]


def places(found: Found, **of: object) -> list[Cell]:
    """The cells at these values of their fields."""
    return [cell for cell in found if all(getattr(cell, name) == value for name, value in of.items())]


def summary(found: Found, cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """Means over cells of each policy, and how it differs from hotness as the paper has it, in points of hit share.

    ``worse`` counts the cells in which it is worse by more than two standard errors of the questions' differences.
    """
    table = {}
    for name in found[cells[0]]:
        mine, theirs = [found[cell][name] for cell in cells], [found[cell][HOTNESS] for cell in cells]
        points = [100 * (one.hit_share - other.hit_share) for one, other in zip(mine, theirs, strict=True)]
        table[name] = {
            "hit_share": _mean(each.hit_share for each in mine),
            "hit_share_bytes": _mean(each.hit_share_bytes for each in mine),
            "bytes_moved": _mean(each.moved for each in mine),
            "points": round(float(np.mean(points)), 2),
            "points_least": round(min(points), 2),
            "points_most": round(max(points), 2),
            "worse": sum(_worse(one, other) for one, other in zip(mine, theirs, strict=True)),
            "cells": len(cells),
        }
    return table


def _mean(values: Iterator[float]) -> float:
    return round(float(np.mean(list(values))), 4)


def _worse(one: Counts, other: Counts) -> bool:
    away = (one.hits - other.hits) / one.wanted
    return bool(away.mean() < -2 * away.std(ddof=1) / np.sqrt(len(away)))


def draw(
    path: Path, title: str, axes: tuple[str, str], lines: dict[str, tuple[list[float], list[float]]]
) -> None:
    """One figure of lines, their names beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.6, 4.2), layout="constrained")
    for colour, marker, (label, (across, up)) in zip(COLOURS, "os^Dv", lines.items(), strict=True):
        axis.plot(across, up, marker=marker, markersize=4, color=colour, label=label)
    axis.set(xlabel=axes[0], ylabel=axes[1])
    axis.set_title(title, loc="left", fontsize=11)
    axis.grid(visible=True, color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    pyplot.close(figure)


def draw_all(folder: Path, by_axis: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
    """The figures of docs/cache.md, from the summaries for each value of each axis."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {
        "knowing the future": BOUND,
        "frequency": CHOSEN,
        "hotness": HOTNESS,
        "lru": "lru",
        "no cache": "none",
    }
    traces, arenas = by_axis["trace"], by_axis["arena"]
    across = [100 * arena for arena in ARENAS]
    draw(folder / "cache-arena.png", "Probed lists there at the join, all traces",
         ("arena, as a share of the index (%)", "probed lists there at the join (%)"),
         {label: (across, [100 * arenas[str(arena)][name]["hit_share"] for arena in ARENAS]) for label, name in shown.items()})  # fmt: skip
    skews = {0.0: "recorded", 0.6: "zipf 0.6", 1.0: "zipf 1.0", 1.4: "zipf 1.4"}
    draw(folder / "cache-skew.png", "Questions that come again; all arenas",
         ("Zipf exponent (0: as recorded)", "probed lists there at the join (%)"),
         {label: (list(skews), [100 * traces[kind][name]["hit_share"] for kind in skews.values()])
          for label, name in shown.items()})  # fmt: skip
    names = [CHOSEN if decay == Frequency.decay else f"decay {decay}" for decay in DECAYS]
    draw(folder / "cache-decay.png", "How long uses are remembered",
         ("questions for which uses are remembered, 1 / (1 - decay)", "points of hit share above hotness"),
         {kind: ([1 / (1 - decay) for decay in DECAYS], [traces[kind][name]["points"] for name in names])
          for kind in ("zipf 1.0", "recorded", "topics", "drift", "bursts")})  # fmt: skip


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nlist", type=int, default=2048)
    parser.add_argument("--copies", type=int, default=7, help="noisy copies of the background in the index")
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--questions", type=int, default=240, help="of a trace")
    parser.add_argument("--seeds", type=int, default=2, help="traces of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the index")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--images", type=Path, help="draw figures into this folder")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()

    store = load(options.folder, options.nlist, options.copies, options.noise, options.seed)
    cells = [
        Cell(*place) for place in itertools.product(TRACES, ARENAS, PROBES, BUDGETS, range(options.seeds))
    ]
    cells += [Cell(*place, HALF)
              for place in itertools.product(("recorded", "zipf 1.0", "drift"), ARENAS, (max(PROBES),), BUDGETS, (0,))]  # fmt: skip
    with ProcessPoolExecutor(options.jobs) as workers:
        found = dict(zip(cells, workers.map(partial(measure, store, options.questions), cells), strict=True))

    everything = summary(found, places(found, predicted=QUESTION))
    print(f"{'':30}{'hits':>8}{'bytes':>8}{'moved':>8}{'points':>8}{'least':>8}{'most':>8}{'worse':>7}")
    for name, row in everything.items():
        print(f"{name:30}" + "".join(f"{row[key]:8.3f}" for key in ("hit_share", "hit_share_bytes", "bytes_moved"))
              + "".join(f"{row[key]:8.2f}" for key in ("points", "points_least", "points_most"))
              + f"{row['worse']:4.0f}/{row['cells']:.0f}")  # fmt: skip
    axes: dict[str, Sequence[object]] = {
        "trace": TRACES,
        "arena": ARENAS,
        "nprobe": PROBES,
        "budget": BUDGETS,
    }
    by_axis = {
        axis: {
            str(value): summary(found, places(found, predicted=QUESTION, **{axis: value})) for value in values
        }
        for axis, values in axes.items()
    }
    for axis, table in by_axis.items():
        for value, rows in table.items():
            print(f"{axis:8}{value:10}", json.dumps({name: rows[name]["points"] for name in rows}))
    refined = summary(found, places(found, predicted=HALF))
    print(
        "by half of the text",
        json.dumps({name: (row["hit_share"], row["points"]) for name, row in refined.items()}),
    )

    if options.images:
        draw_all(options.images, by_axis)
    if options.output:
        from telerag_cli.bench_record import record

        best, paper = everything[CHOSEN], everything[HOTNESS]
        figures = [
            {"what": f"Probed lists in fast memory at the join, mean of {best['cells']} cells (7 kinds of traces, 4 sizes of arenas)",
             "value": f"{best['hit_share']:.3f} by frequency; worse than hotness by more than two standard errors in {best['worse']} cells",
             "against": f"{paper['hit_share']:.3f} with the paper's hotness, {everything['lru']['hit_share']:.3f} with LRU, "
                        f"{everything[BOUND]['hit_share']:.3f} knowing the future",
             "goal": "at least a point better than hotness, and in no cell worse by more than noise"},
        ]  # fmt: skip
        result = record(shlex.join(["python", *sys.argv]), nlist=options.nlist, lists_bytes=int(store.extents.sum()),
                        questions=options.questions, seeds=options.seeds, policies=everything, by_axis=by_axis,
                        by_half_of_the_text=refined, figures=figures)  # fmt: skip
        write_json(options.output, result)


if __name__ == "__main__":
    main()
