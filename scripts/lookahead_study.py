"""How often to look at the text that an LLM writes, and what to move then: the study behind `telerag_cli.lookahead.order`.

    python scripts/lookahead_study.py FOLDER [-o RESULT.json] [--images FOLDER] [--recorded FOLDER --embeddings FOLDER]

FOLDER holds ``trace.jsonl`` (``question`` and the text ``generated`` for it), ``embeddings.npz`` (array ``generated_100``: the
embedding of each whole text) and ``background.npy`` (other real embeddings, for the index). Beginnings of the texts are embedded
as the product does it, and kept in FOLDER. The index is made of the background and noisy copies of it; the real query is the
whole text. A link of rate 1 moves, while the text is written, as many bytes as the query probes; time in which it has nothing to
do is lost. What is chosen, is chosen on other questions than those that are reported.

``--recorded`` names a folder of ``PIPELINE.jsonl`` as ``telerag run --record`` writes them, and ``--embeddings`` what
``telerag embed`` made of the passages: the same policies on what those pipelines searched.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from telerag_cli.config import Metric
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.embedding.encoder import Encoder
from telerag_cli.engine.refiner import AWAITED
from telerag_cli.files import write_json, writing
from telerag_cli.generation.shapes import Lines
from telerag_cli.index.artifact import FloatArray, IntArray, extent_bytes
from telerag_cli.index.scoring import Coarse
from telerag_cli.lookahead.order import (
    CHECKPOINTS,
    PATIENT_CHECKPOINTS,
    blend,
    interleave,
    reach,
    text_weight,
)
from telerag_cli.lookahead.plan import Plan
from telerag_cli.pipelines.flare import about
from telerag_cli.tiers.residency import BoolArray

Floats = npt.NDArray[np.float64]

STEP = 0.05
SHARES = tuple(round(STEP * number, 2) for number in range(1, 21))
"""Shares of the words at which texts are embedded, once for all policies."""
RATES = (0.64, 1.0, 1.28, 1.6)
THREE = (0.3, 0.6, 0.9)
GRID = tuple(round(0.1 * number, 2) for number in range(1, 10))
CHECKED = 48
"""Questions that are also replayed through the product's own planner."""


@dataclass(frozen=True)
class Stage:
    """An order that is followed from some moment on."""

    begins: Floats
    """Share of the window that has passed, for each question, (n,); 1 and more if it never comes."""
    order: IntArray
    """Lists, best first, (n, reach)."""
    patient: bool
    """Followed even if the link has nothing left to move."""


@dataclass(frozen=True)
class Outcome:
    """Means over questions."""

    lists: float
    """Share of the probed lists that are there at the join."""
    bytes: float
    """Share of the probed bytes."""
    moved: float
    """Bytes moved, as a multiple of those probed."""
    looks: float
    """Embeddings of the text."""


@dataclass(frozen=True)
class Store:
    """What an index says of its lists, and what some queries probe."""

    extents: Floats
    probed: BoolArray
    """Of each query, (n, nlist)."""

    @cached_property
    def probed_bytes(self) -> Floats:
        """Of each query, (n,)."""
        total: Floats = self.probed @ self.extents
        return total


def follow(stages: Sequence[Stage], store: Store, rate: float, budget: float = np.inf) -> Outcome:
    """Move lists at a steady rate, each question by itself, all of them at once.

    Args:
        stages: the orders, in time.
        store: what is probed.
        rate: bytes that can be moved in the window, as a multiple of those probed.
        budget: bytes that may be moved, as a multiple of those probed.
    """
    count = len(store.probed)
    moved = np.zeros_like(store.probed)
    used, spent, looks = np.zeros(count), np.zeros(count), np.zeros(count)
    idle = np.zeros(count, np.bool_)
    for number, stage in enumerate(stages):
        end = stages[number + 1].begins if number + 1 < len(stages) else np.ones(count)
        begins, end = np.minimum(stage.begins, 1.0), np.minimum(end, 1.0)
        live = begins < end
        looking = live & (~idle | stage.patient)
        looks += looking if number else 0
        nbytes = np.where(np.take_along_axis(moved, stage.order, 1), 0.0, store.extents[stage.order])
        before = np.cumsum(nbytes, 1) - nbytes
        capacity = rate * store.probed_bytes * end
        taken = (before + used[:, None] < capacity[:, None]) & looking[:, None]
        taken &= before + spent[:, None] < budget * store.probed_bytes[:, None]
        now = np.zeros_like(moved)
        np.put_along_axis(now, stage.order, taken, 1)
        moved |= now
        got = (nbytes * taken).sum(1)
        spent += got
        used += got
        idle = np.where(looking, got >= nbytes.sum(1), idle)
        # What an idle link did not move in its time it does not move later.
        used = np.where(live & idle, np.maximum(used, capacity), used)
    hits = moved & store.probed
    return Outcome(
        lists=float((hits.sum(1) / store.probed.sum(1)).mean()),
        bytes=float((hits @ store.extents / store.probed_bytes).mean()),
        moved=float((spent / store.probed_bytes).mean()),
        looks=float(looks.mean()),
    )


def follow_planned(stages: Sequence[Stage], store: Store, rate: float) -> float:
    """Share of the probed lists, by the product's own planner."""
    shares = []
    for row, probed in enumerate(store.probed):
        plan = Plan(store.extents.astype(np.int64), np.zeros(len(store.extents), np.bool_))
        absent, used, idle = np.ones(len(store.extents), np.bool_), 0.0, False
        for number, stage in enumerate(stages):
            end = float(stages[number + 1].begins[row]) if number + 1 < len(stages) else 1.0
            capacity = rate * store.probed_bytes[row] * min(end, 1.0)
            if stage.begins[row] < min(end, 1.0) and (stage.patient or not idle):
                plan.reorder(stage.order[row], stage.order.shape[1])
                while used < capacity and (taken := plan.take(absent, 1)):
                    absent[taken] = False
                    used += float(store.extents[taken].sum())
                idle = not absent[stage.order[row]].any()
            if idle:
                used = max(used, capacity)
        shares.append(float((~absent[probed]).mean()))
    return float(np.mean(shares))


def make_index(
    background: FloatArray, nlist: int, copies: int, noise: float, seed: int
) -> tuple[Coarse, Floats, FloatArray]:
    """Train on the background and noisy copies; the coarse quantizer, the bytes of each list, and the centroids."""
    random = np.random.default_rng(seed)
    parts = [background]
    for _ in range(copies):
        direction = random.standard_normal(background.shape, dtype=np.float32)
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        noisy = background + noise * direction
        parts.append(noisy / np.linalg.norm(noisy, axis=1, keepdims=True))
    vectors = np.concatenate(parts)
    kmeans = faiss.Kmeans(
        vectors.shape[1], nlist, niter=10, seed=seed, spherical=True, max_points_per_centroid=64
    )
    kmeans.train(vectors)
    coarse = Coarse(kmeans.centroids, Metric.IP)
    _scores, assigned = coarse.index.search(vectors, 1)
    sizes = np.bincount(assigned[:, 0], minlength=nlist).astype(np.uint64)
    return coarse, extent_bytes(sizes, vectors.shape[1] * 4).astype(np.float64), kmeans.centroids


def embed(encoder: Encoder, texts: Sequence[str]) -> FloatArray:
    """As the product embeds a growing text; equal texts once, texts of like length together."""
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    batches = [encoder.sketch(distinct[start : start + 64]) for start in range(0, len(distinct), 64)]
    place = {text: number for number, text in enumerate(distinct)}
    vectors: FloatArray = np.concatenate(batches)[[place[text] for text in texts]]
    return vectors


def beginning(text: str, share: float) -> str:
    """The first words of a text, its line breaks kept."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text[: ends[max(1, round(share * len(ends))) - 1]] if ends else ""


@dataclass(frozen=True)
class Questions:
    """Some of the questions: embeddings of each, (n, dimension), and of its text's beginnings, (n, shares, dimension)."""

    question: FloatArray
    text: FloatArray
    joint: FloatArray
    """Of the question and the text's beginning as one text."""
    final: FloatArray
    words: Floats
    store: Store

    def written(self, of: FloatArray, share: float | Floats) -> FloatArray:
        """Of ``text`` or ``joint``, when a share of the words is written, rounded down to what was embedded."""
        place = np.clip(np.floor(np.asarray(share) / STEP + 1e-6).astype(int) - 1, 0, len(SHARES) - 1)
        vectors: FloatArray = of[np.arange(len(of)), place]
        return vectors


Predict = Callable[[Questions, float, "float | Floats"], FloatArray]
"""The lookahead queries when a share of the text is believed to be written, and a share of it is; not called for 0."""


def blended(some: Questions, believed: float, written: float | Floats) -> FloatArray:
    """As the product does it."""
    pairs = zip(some.question, some.written(some.text, written), strict=True)
    return np.stack([blend(question, text, believed) for question, text in pairs])


def text_only(some: Questions, _believed: float, written: float | Floats) -> FloatArray:
    """The text as it is."""
    return some.written(some.text, written)


def joint_only(some: Questions, _believed: float, written: float | Floats) -> FloatArray:
    """Question and text as one text."""
    return some.written(some.joint, written)


def joint_and_text(some: Questions, believed: float, written: float | Floats) -> FloatArray:
    """Two embeddings a look, the one of both giving way to the one of the text."""
    mixed: FloatArray = (1 - text_weight(believed)) * some.written(some.joint, written)
    return mixed + text_weight(believed) * some.written(some.text, written)


def ahead_of_text(some: Questions, believed: float, written: float | Floats) -> FloatArray:
    """A tenth of the way from the question to the text added: where it seems to be going."""
    text = some.written(some.text, written)
    return blended(some, believed, written) + np.float32(0.1) * (text - some.question)


def best_weights(some: Questions, _believed: float, written: float | Floats) -> FloatArray:
    """The weight of each question that comes nearest to what will be searched; nobody can know it."""
    text = some.written(some.text, written)
    tried = np.stack([(1 - weight) * some.question + weight * text for weight in np.arange(0.0, 1.21, 0.1)])
    near = (tried * some.final).sum(-1) / np.linalg.norm(tried, axis=-1)
    best: FloatArray = tried[near.argmax(0), np.arange(len(text))].astype(np.float32)
    return best


def perfect(some: Questions, _believed: float, _written: float | Floats) -> FloatArray:
    """What will be searched."""
    return some.final


@dataclass(frozen=True)
class Policy:
    """When the text is looked at, what is made of it, and how far down its order lists are moved."""

    checkpoints: tuple[float, ...] = CHECKPOINTS
    patient: tuple[float, ...] = PATIENT_CHECKPOINTS
    predict: Predict = blended
    first: Predict | None = None
    """What the first order is made from, instead of the question."""
    reach: Callable[[int, float], int] = lambda nprobe, share: reach(nprobe, share, refining=True)
    rescore: Callable[[FloatArray, float], FloatArray] | None = None
    """What the lists' scores, (n, nlist), become at a share of the text, before they are ordered."""
    several: bool = True
    """Lists are moved for each of several queries, and a query more than before is followed even if the link is idle."""


QUESTION_ONLY = Policy((), (), reach=lambda nprobe, _share: 2 * nprobe)
BEFORE = Policy(
    (0.15, 0.3, 0.45, 0.6, 0.75, 0.9),
    (0.45, 0.75, 0.9),
    reach=lambda nprobe, share: int(np.ceil(nprobe * (0.5 + 0.8 * share))),
    several=False,
)
PERFECT = replace(QUESTION_ONLY, first=perfect)
LOOKS_THREE = Policy(THREE, THREE)


def at(*checkpoints: float) -> Policy:
    """The default, but looking at these shares, and with an order for as long as there is no better one."""
    return Policy(checkpoints, checkpoints, reach=lambda nprobe, _share: 2 * nprobe)


def waiting(rate: float) -> Policy:
    """Nothing is moved before the link must start to move in time what is probed; three looks in what is left."""
    start = max(STEP, round(STEP * int((1 - 1 / rate) / STEP + 1e-6), 2))
    looks = tuple(round(STEP * round((start + (1 - start) * part) / STEP), 2) for part in (0.0, 0.4, 0.75))
    return Policy(looks, looks, reach=lambda nprobe, share: 2 * nprobe if share else 0)


class Lab:
    """Runs policies over questions and remembers the orders that they share."""

    def __init__(self, coarse: Coarse, centroids: FloatArray, nprobe: int) -> None:
        self.coarse = coarse
        self.centroids = centroids
        self.nprobe = nprobe
        self._orders: dict[tuple[object, ...], IntArray] = {}

    def stages(self, some: Questions, policy: Policy, expected_words: float | None = None) -> list[Stage]:
        """The orders of a policy.

        Args:
            some: the questions.
            policy: the policy.
            expected_words: how long every text is believed to become; without it, each one's length is known.
        """
        made = []
        for share in (0.0, *policy.checkpoints):
            begins = np.full(len(some.question), share)
            if expected_words is not None:
                begins = np.minimum(share * expected_words / some.words, 1.0)
            predict = policy.predict if share else policy.first
            key = (id(some), predict, share, expected_words, policy.rescore)
            if key not in self._orders:
                vectors = predict(some, share, begins) if predict else some.question
                self._orders[key] = self._order(vectors, share, policy)
            order = self._orders[key][:, : policy.reach(self.nprobe, share)]
            made.append(Stage(begins, order, not share or share in policy.patient))
        return made

    def run(self, some: Questions, policy: Policy, rate: float = 1.0, expected_words: float | None = None,
            budget: float = np.inf) -> Outcome:  # fmt: skip
        """What comes of it."""
        return follow(self.stages(some, policy, expected_words), some.store, rate, budget)

    def _order(self, vectors: FloatArray, share: float, policy: Policy) -> IntArray:
        if policy.rescore is None:
            return self.coarse.probe(vectors, 2 * self.nprobe)[1]
        scores = policy.rescore(vectors @ self.centroids.T, share)
        best: IntArray = np.argsort(-scores, axis=1)[:, : 2 * self.nprobe]
        return best


def dense(extents: Floats, nprobe: int, power: float) -> Callable[[FloatArray, float], FloatArray]:
    """Order by the probability of a list divided by a power of its bytes. Probabilities are fitted to the other half."""

    def scores(values: FloatArray, share: float) -> FloatArray:
        last = -np.partition(-values, nprobe - 1, axis=1)[:, nprobe - 1 : nprobe]
        width = np.interp(share, (0.0, 0.3, 0.6, 0.9), (0.03, 0.03, 0.02, 0.01))
        likely = -np.logaddexp(0.0, -(values - last) / width)
        return (likely - power * np.log(extents)).astype(np.float32)

    return scores


def popular(others: Questions, weight: float) -> Callable[[FloatArray, float], FloatArray]:
    """Lists that other questions probe often count more."""
    often = np.log(others.store.probed.mean(0) + 0.002)
    return lambda values, share: values + np.float32(weight * (1 - share)) * often


def feedback(centroids: FloatArray) -> Callable[[FloatArray, float], FloatArray]:
    """The query moved towards the centroids that are nearest to it, less the more of the text there is."""

    def scores(values: FloatArray, share: float) -> FloatArray:
        weights = np.exp((values - values.max(1, keepdims=True)) / 0.05)
        nearest = weights @ centroids
        nearest /= np.linalg.norm(nearest, axis=1, keepdims=True)
        changed: FloatArray = values + np.float32(0.3 * max(0.0, 1 - 3 * share)) * (nearest @ centroids.T)
        return changed

    return scores


def learned(others: Questions) -> Predict:
    """A ridge regression from question and text to what is searched, fitted to the other half."""
    fits: dict[float, tuple[FloatArray, FloatArray, FloatArray]] = {}

    def predict(some: Questions, believed: float, written: float | Floats) -> FloatArray:
        if believed not in fits:
            known = np.concatenate([others.question, others.written(others.text, believed)], axis=1)
            centre, target = known.mean(0), others.final.mean(0)
            away = known - centre
            matrix = np.linalg.solve(
                away.T @ away + 10 * np.eye(known.shape[1]), away.T @ (others.final - target)
            )
            fits[believed] = (centre, target, matrix.astype(np.float32))
        centre, target, matrix = fits[believed]
        given = np.concatenate([some.question, some.written(some.text, written)], axis=1)
        guess: FloatArray = ((given - centre) @ matrix + target).astype(np.float32)
        return guess

    return predict


def load_questions(
    folder: Path, rows: IntArray, coarse: Coarse, extents: Floats, nprobe: int, name: str
) -> Questions:
    """Embed their texts' beginnings, or read what an earlier run embedded."""
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = folder / f"beginnings_{name}_{len(rows)}.npz"
    if not kept.exists():
        encoder = Encoder.load()
        questions = [lines[row]["question"] for row in rows]
        begun = [beginning(lines[row]["generated"], share) for row in rows for share in SHARES]
        both = [
            f"{question} {text}"
            for number, question in enumerate(questions)
            for text in begun[number * len(SHARES) : (number + 1) * len(SHARES)]
        ]
        shape = (len(rows), len(SHARES), -1)
        vectors = embed(encoder, questions)
        text, joint = (embed(encoder, texts).reshape(shape) for texts in (begun, both))
        with writing(kept) as temporary, temporary.open("wb") as file:
            np.savez(file, rows=rows, question=vectors, text=text, joint=joint)
    held = np.load(kept)
    if not np.array_equal(held["rows"], rows):
        sys.exit(f"{kept} is of other questions. Delete it.")
    final = np.load(folder / "embeddings.npz")["generated_100"][rows].astype(np.float32)
    probed = np.zeros((len(rows), coarse.nlist), np.bool_)
    np.put_along_axis(probed, coarse.probe(final, nprobe)[1], True, 1)
    words = np.array([len(lines[row]["generated"].split()) for row in rows], np.float64)
    return Questions(held["question"], held["text"], held["joint"], final, words, Store(extents, probed))


# Recorded pipelines


@dataclass(frozen=True)
class Recorded:
    """A text that an LLM wrote while lookahead would have run, and what was searched after it."""

    start: str
    text: str
    searched: Sequence[str]
    expect: Callable[[str], Sequence[str]]


def _with_question(question: str, text: str) -> list[str]:
    return [f"{question} {text}"]


def recorded(path: Path) -> Iterator[Recorded]:
    """What ``telerag run --record`` noted of one pipeline; what it calls its stages says which text came before which search."""
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if "generations" not in line or "retrievals" not in line:
            continue
        question = line["question"]
        texts = {each["stage"]: each["text"] for each in line["generations"]}
        searches = [each["queries"] for each in line["retrievals"]]
        match line["pipeline"]:
            case "hyde":
                yield Recorded(question, texts["passage"], searches[0], lambda text: [text])
            case "subquestion":
                yield Recorded(question, texts["sub_questions"], searches[0], Lines(3).finished)
            case "iterative":
                for number, queries in enumerate(searches, 1):
                    start = question if number == 1 else searches[number - 2][0]
                    yield Recorded(start, texts[f"query_{number}"], queries, lambda text: [text])
            case "iter_retgen":
                for number, queries in enumerate(searches[1:], 1):
                    yield Recorded(searches[number - 1][0], texts[f"draft_{number}"], queries,
                                   partial(_with_question, question))  # fmt: skip
            case "flare":
                written, left = "", iter(searches)
                for number in range(1, 1 + sum(stage.startswith("sentence_") for stage in texts)):
                    draft = texts[f"sentence_{number}"]
                    if f"rewrite_{number}" in texts:
                        start = written or question
                        yield Recorded(start, draft, next(left), partial(about, start))
                    sentence = texts.get(f"rewrite_{number}", draft)
                    written = f"{written} {sentence}".strip()


def recorded_stages(each: Recorded, policy: Policy, coarse: Coarse, encoder: Encoder, nprobe: int) -> list[Stage]:  # fmt: skip
    """A policy's orders for one text. A query more than before is followed at once, as in the product."""
    start = encoder.sketch([each.start])[0]
    first = coarse.rank(start)[None, : policy.reach(nprobe, 0.0)]
    stages = [Stage(np.zeros(1), first, True)]
    if not policy.checkpoints:
        return stages
    words, before = len(each.text.split()), 0.0
    taken: list[str] | None = None
    for share in [number / max(words, 1) for number in range(1, words)]:
        queries = list(each.expect(beginning(each.text, share)))
        passed = [checkpoint for checkpoint in policy.checkpoints if before < checkpoint <= share]
        more = len(queries) > max(len(taken or ()), 1)
        if not passed and not more:
            continue
        before = share
        if queries == taken or not (queries or policy.several):
            continue
        taken = queries
        vectors = encoder.sketch(queries) if queries else start[None]
        order = interleave([coarse.rank(blend(start, vector, share)) for vector in vectors])
        count = (len(queries) or AWAITED) if policy.several else 1
        patient = any(checkpoint in policy.patient for checkpoint in passed)
        followed = patient or (policy.several and (more or not queries))
        best = order[None, : policy.reach(count * nprobe, share)]
        stages.append(Stage(np.array([share]), best, followed))
    return stages


def study_recorded(folder: Path, embeddings: Path, policies: dict[str, Policy], nlist: int, nprobe: int, copies: int, noise: float,
                   seed: int) -> dict[str, object]:  # fmt: skip
    """The policies on every pipeline that was recorded."""
    passages = Embeddings.open(embeddings)
    vectors = passages.sample(np.arange(passages.rows), lambda _rows: None).astype(np.float32)
    coarse, extents, _centroids = make_index(vectors, nlist, copies, noise, seed)
    encoder = Encoder.load()
    found: dict[str, object] = {
        "nlist": nlist, "nprobe": nprobe, "vectors": len(vectors) * (copies + 1), "lists": {}}  # fmt: skip
    tables: dict[str, object] = {}
    for path in sorted(folder.glob("*.jsonl")):
        texts = [each for each in recorded(path) if each.text.strip() and each.searched]
        if not texts:
            continue
        stores = []
        for each in texts:
            probed = np.zeros((1, nlist), np.bool_)
            probed[0, coarse.probe(encoder.encode_queries(each.searched), nprobe)[1].ravel()] = True
            stores.append(Store(extents, probed))
        table: dict[str, object] = {"texts": len(texts)}
        for name, policy in policies.items():
            staged = [recorded_stages(each, policy, coarse, encoder, nprobe) for each in texts]
            table[name] = {
                str(rate): mean_of([follow(stages, store, rate) for stages, store in zip(staged, stores, strict=True)])
                for rate in (1.0, 1.6)}  # fmt: skip
        tables[path.stem] = table
        print(path.stem, json.dumps(table))
    found["lists"] = tables
    return found


def mean_of(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Their mean."""
    return {name: round(float(np.mean([getattr(each, name) for each in outcomes])), 4) for name in Outcome.__annotations__}  # fmt: skip


# Figures

COLOURS = ("#1f5fa8", "#3a8f4d", "#7a4fa0", "#c8551b", "#8a6d1d")
COLOUR_OF = {"default": "#c8551b", "three looks": "#3a8f4d", "before": "#7a4fa0", "question only": "#8a6d1d"}


def draw(
    path: Path, title: str, axes: tuple[str, str], lines: dict[str, tuple[list[float], list[float]]]
) -> None:
    """One figure of lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.0, 4.6), layout="constrained")
    for number, (label, (across, up)) in enumerate(lines.items()):
        axis.plot(
            across, up, marker="o", markersize=4, color=COLOUR_OF.get(label, COLOURS[number]), label=label
        )
    axis.set(xlabel=axes[0], ylabel=axes[1])
    axis.set_title(title, loc="left", fontsize=11)
    axis.grid(visible=True, color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    pyplot.close(figure)


def draw_all(folder: Path, lab: Lab, test: Questions, expected_words: float) -> None:
    """The three figures of docs/lookahead.md."""
    folder.mkdir(parents=True, exist_ok=True)
    rates = [round(0.1 * number, 1) for number in range(1, 21)]
    named = {"perfect knowledge": PERFECT, "default": Policy(), "before": BEFORE, "three looks": LOOKS_THREE,
             "question only": QUESTION_ONLY}  # fmt: skip
    curves = {
        name: (list(rates), [100 * lab.run(test, policy, rate).lists for rate in rates])
        for name, policy in named.items()
    }
    draw(folder / "lookahead_curves.png", "The text says in time most of what will be probed",
         ("bytes that the link can move, as a multiple of those probed", "probed lists there at the join (%)"), curves)  # fmt: skip
    single = [100 * lab.run(test, at(share)).lists for share in SHARES[:-1]]
    evenly = [
        (count, 100 * lab.run(test, at(*even(count))).lists) for count in (1, 2, 3, 4, 5, 6, 8, 10, 14, 19)
    ]
    draw(folder / "lookahead_place.png", "One look is worth most a little after the half",
         ("share of the text written when it is looked at (%)", "probed lists there at the join (%)"),
         {"one look, rate 1": ([100 * share for share in SHARES[:-1]], single)})  # fmt: skip
    known = [
        100 * lab.run(test, replace(at(*even(count)), predict=best_weights)).lists for count, _ in evenly
    ]
    draw(folder / "lookahead_looks.png", "More looks help less and less",
         ("looks at the text, evenly placed", "probed lists there at the join (%), rate 1"),
         {"best weight of each question, known beforehand": ([count for count, _ in evenly], known),
          "the product's weights": ([count for count, _ in evenly], [share for _, share in evenly])})  # fmt: skip
    spare: dict[str, tuple[list[float], list[float]]] = {}
    for name, policy in (("default", Policy()), ("three looks", LOOKS_THREE), ("before", BEFORE)):
        points = [
            lab.run(test, policy, rate, expected_words) for rate in (0.5, 0.75, 1.0, 1.3, 1.6, 2.0, 3.0, 6.0)
        ]
        spare[name] = ([each.moved for each in points], [100 * each.lists for each in points])  # fmt: skip
    draw(folder / "lookahead_lengths.png", "When only the mean length of texts is known: links from 0.5 to 6",
         ("bytes moved, as a multiple of those probed", "probed lists there at the join (%)"), spare)  # fmt: skip


def even(count: int) -> tuple[float, ...]:
    """So many shares, evenly placed and rounded to those that were embedded."""
    return tuple(round(STEP * round(number / (count + 1) / STEP), 2) for number in range(1, count + 1))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nlist", type=int, default=2048)
    parser.add_argument("--nprobe", type=int, default=128)
    parser.add_argument("--copies", type=int, default=7, help="noisy copies of the background in the index")
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument(
        "--questions", type=int, default=722, help="every n-th question, so many in all, and as many others"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=Path, help="draw figures into this folder")
    parser.add_argument("--recorded", type=Path, help="folder of PIPELINE.jsonl, by telerag run --record")
    parser.add_argument("--embeddings", type=Path, help="what telerag embed made of the recorded index")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if bool(options.recorded) != bool(options.embeddings):
        parser.error("--recorded and --embeddings go together")

    background = np.load(options.folder / "background.npy").astype(np.float32)
    coarse, extents, centroids = make_index(
        background, options.nlist, options.copies, options.noise, options.seed
    )
    total = len((options.folder / "trace.jsonl").read_text(encoding="utf-8").splitlines())
    chosen = np.linspace(0, total - 1, min(options.questions, total // 2)).astype(np.int64)
    rest = np.setdiff1d(np.arange(total), chosen)
    others = rest[np.linspace(0, len(rest) - 1, len(chosen)).astype(np.int64)]
    test, train = (load_questions(options.folder, rows, coarse, extents, options.nprobe, name)
                   for rows, name in ((chosen, "test"), (others, "train")))  # fmt: skip
    lab = Lab(coarse, centroids, options.nprobe)
    few = Store(extents, test.store.probed[:CHECKED])
    for policy in (Policy(), LOOKS_THREE):
        stages = [
            Stage(each.begins[:CHECKED], each.order[:CHECKED], each.patient)
            for each in lab.stages(test, policy)
        ]
        for rate in (1.0, 1.6, 3.0):
            ours, planned = follow(stages, few, rate).lists, follow_planned(stages, few, rate)
            if abs(ours - planned) > 1e-9:
                sys.exit(
                    f"At rate {rate} this study finds {ours:.6f} and the product's planner {planned:.6f}."
                )

    print(f"{'share of probed lists, by rate':34}" + "".join(f"{rate:>8}" for rate in RATES))
    modes = {"question": QUESTION_ONLY, "before": BEFORE, "refined": Policy(), "three": LOOKS_THREE, "perfect": PERFECT}  # fmt: skip
    shares: dict[str, dict[str, float]] = {}
    share_bytes: dict[str, dict[str, float]] = {}
    for name, policy in modes.items():
        outcomes = [lab.run(test, policy, rate) for rate in RATES]
        shares[name] = {str(rate): round(each.lists, 4) for rate, each in zip(RATES, outcomes, strict=True)}
        share_bytes[name] = {str(rate): round(each.bytes, 4) for rate, each in zip(RATES, outcomes, strict=True)}  # fmt: skip
        print(f"{name:34}" + "".join(f"{each.lists:8.3f}" for each in outcomes))

    places: dict[str, object] = {}
    for count in (1, 2, 3):
        best = max(combinations(GRID, count), key=lambda looks: lab.run(train, at(*looks)).lists)
        places[str(count)] = {
            "looks": best,
            "train": round(lab.run(train, at(*best)).lists, 4),
            "test": round(lab.run(test, at(*best)).lists, 4),
        }
    for checkpoints in ((0.25, 0.5, 0.75), (0.1, 0.3, 0.6), (0.2, 0.4, 0.65, 0.9), CHECKPOINTS, SHARES[:-1]):
        places[", ".join(map(str, checkpoints)) if len(checkpoints) < 19 else "every 0.05"] = {
            "test": round(lab.run(test, at(*checkpoints)).lists, 4)
        }
    print("places", json.dumps(places))

    tried = {
        "as it is": Policy(),
        "text only": Policy(predict=text_only),
        "question and text as one text": Policy(predict=joint_only),
        "that and the text, two embeddings a look": Policy(predict=joint_and_text),
        "a tenth further than the text": Policy(predict=ahead_of_text),
        "regression on other questions": Policy(predict=learned(train)),
        "lists that other questions probe": Policy(rescore=popular(train, 0.02)),
        "feedback from the nearest centroids": Policy(rescore=feedback(centroids)),
        "probability by the root of bytes": Policy(rescore=dense(extents, options.nprobe, 0.5)),
        "probability by bytes": Policy(rescore=dense(extents, options.nprobe, 1.0)),
        "best weight of each, known beforehand": Policy(predict=best_weights),
    }
    ablations: dict[str, dict[str, float]] = {}
    for name, policy in tried.items():
        six = lab.run(test, policy)
        three = lab.run(test, replace(policy, checkpoints=THREE, patient=THREE))
        ablations[name] = {key: round(value, 4) for key, value in (
            ("lists", six.lists), ("bytes", six.bytes), ("lists_three", three.lists), ("bytes_three", three.bytes))}  # fmt: skip
        print(f"{name:42}" + "".join(f"{value:8.3f}" for value in ablations[name].values()))

    expected_words = float(train.words.mean())
    links = {
        length: {
            name: {str(rate): mean_of([lab.run(test, policy, rate, words)]) for rate in (1.0, 1.6, 3.0)}
            for name, policy in modes.items() if name != "perfect"}
        for length, words in (("each known", None), ("mean known", expected_words))}  # fmt: skip
    for length, table in links.items():
        for name, row in table.items():
            print(f"{length:12}{name:10}", *(tuple(outcome.values()) for outcome in row.values()))

    spare = {
        str(rate): {
            f"{name}, {length}": {"checkpoints": policy.checkpoints,
                                  **mean_of([lab.run(test, policy, rate, words, budget=1.0)])}
            for name, policy in (("at once", LOOKS_THREE), ("waiting", waiting(rate)))
            for length, words in (("each known", None), ("mean known", expected_words))}
        for rate in (1.6, 2.0, 3.0, 6.0)}  # fmt: skip
    print("budget 1", json.dumps(spare, indent=1))

    pipelines = None
    if options.recorded:
        compared = {"question": QUESTION_ONLY, "before": BEFORE, "refined": Policy(), "three": LOOKS_THREE}
        pipelines = study_recorded(options.recorded, options.embeddings, compared, 512, 32, options.copies, options.noise,
                                   options.seed)  # fmt: skip
    if options.images:
        draw_all(options.images, lab, test, expected_words)
    if options.output:
        from telerag_cli.bench_record import record

        of = f"{len(chosen)} questions, {options.nprobe} of {options.nlist} lists"
        figures = [
            {"what": f"Probed lists already moved at the join, on a link that can move as many bytes as are probed ({of})",
             "value": f"{shares['refined']['1.0']:.2f} refined, {shares['three']['1.0']:.2f} with three looks at the text",
             "goal": "at least 0.85 with three",
             "against": f"{shares['question']['1.0']:.2f} with the question only"},
            {"what": "The same, on a link that can move 1.6 times as many",
             "value": f"{shares['refined']['1.6']:.2f} refined, {shares['three']['1.6']:.2f} with three looks at the text",
             "goal": "at least 0.95 with three",
             "against": f"{shares['question']['1.6']:.2f} with the question only"},
        ]  # fmt: skip
        result = record(shlex.join(["python", *sys.argv]), questions=len(chosen), nlist=options.nlist, nprobe=options.nprobe,
                        vectors=len(background) * (options.copies + 1), resident_share=shares, resident_bytes=share_bytes,
                        places=places, ablations=ablations, links=links, budget_of_one=spare, mean_words=round(expected_words, 1),
                        pipelines=pipelines, figures=figures)  # fmt: skip
        write_json(options.output, result)


if __name__ == "__main__":
    main()
