"""How well lookahead predicts the lists a query will probe, by the product's own planner.

    python scripts/lookahead_quality.py FOLDER [--nlist 2048] [--nprobe 128] [-o RESULT.json]

FOLDER holds ``trace.jsonl`` (``question`` and the text ``generated`` for it), ``embeddings.npz`` (arrays ``question`` and
``generated_100``: for each line the embedding of the question and of the whole text) and ``background.npy`` (other real embeddings,
for the index). The text is embedded again, with the bundled model, at the checkpoints at which the product embeds it. The index
is made of the background and noisy copies of it; the real query is the whole text. Moving is taken to keep a steady rate while
the text is written: when a quarter of it is there, a quarter of the bytes has been moved.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from telerag_cli.config import Metric
from telerag_cli.embedding.encoder import Encoder
from telerag_cli.index.artifact import FloatArray, IntArray, extent_bytes
from telerag_cli.index.scoring import Coarse
from telerag_cli.lookahead.order import CHECKPOINTS, blend, reach
from telerag_cli.lookahead.plan import Plan

BUDGETS = (0.64, 1.0, 1.28, 1.6)
Predict = Callable[[int, float], FloatArray]


def embed_prefixes(trace: Path, rows: IntArray) -> dict[tuple[int, float], FloatArray]:
    """The text of each row's first words, by row and share of the words, as the product embeds it while it grows."""
    encoder = Encoder.load()
    texts = [json.loads(line)["generated"].split() for line in trace.read_text(encoding="utf-8").splitlines()]
    keys = [(int(row), fraction) for fraction in CHECKPOINTS for row in rows]
    prefixes = [" ".join(texts[row][: max(1, round(fraction * len(texts[row])))]) for row, fraction in keys]
    vectors = [encoder.encode_queries(prefixes[start : start + 64]) for start in range(0, len(prefixes), 64)]
    return dict(zip(keys, np.concatenate(vectors), strict=True))


def make_index(
    background: FloatArray, nlist: int, copies: int, noise: float, seed: int
) -> tuple[Coarse, IntArray]:
    """Train on the background and noisy copies; the coarse quantizer and the bytes of each list."""
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
    return coarse, extent_bytes(sizes, vectors.shape[1] * 4)


def replay(coarse: Coarse, extents: IntArray, probed: IntArray, budget_bytes: float, predict: Predict, question: int,
           checkpoints: tuple[float, ...]) -> float:  # fmt: skip
    """Share of the probed lists that the plan has moved when the text is done, for one question."""
    plan = Plan(np.ones(coarse.nlist, np.int64), np.zeros(coarse.nlist, np.bool_))
    absent = np.ones(coarse.nlist, np.bool_)
    moved_bytes = 0.0
    for begin, end in zip((0.0, *checkpoints), (*checkpoints, 1.0), strict=True):
        plan.reorder(
            coarse.rank(predict(question, begin)), reach(len(probed), begin, refining=bool(checkpoints))
        )
        while moved_bytes < end * budget_bytes and (taken := plan.take(absent, 1)):
            absent[taken] = False
            moved_bytes += float(extents[taken].sum())
    return float((~absent[probed]).mean())


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
    parser.add_argument("--questions", type=int, default=722, help="every n-th question, so many in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()

    arrays = {
        name: array.astype(np.float32) for name, array in np.load(options.folder / "embeddings.npz").items()
    }
    background = np.load(options.folder / "background.npy").astype(np.float32)
    coarse, extents = make_index(background, options.nlist, options.copies, options.noise, options.seed)
    final = arrays["generated_100"]
    chosen = np.linspace(0, len(final) - 1, min(options.questions, len(final))).astype(int)
    written = embed_prefixes(options.folder / "trace.jsonl", chosen)

    def question_only(row: int, _fraction: float) -> FloatArray:
        vector: FloatArray = arrays["question"][row]
        return vector

    def refined(row: int, fraction: float) -> FloatArray:
        question = arrays["question"][row]
        return blend(question, written[row, fraction], fraction) if fraction else question

    def perfect(row: int, _fraction: float) -> FloatArray:
        vector: FloatArray = final[row]
        return vector

    modes: dict[str, tuple[Predict, tuple[float, ...]]] = {
        "question": (question_only, ()), "refined": (refined, CHECKPOINTS), "perfect": (perfect, ())}  # fmt: skip
    shares: dict[str, dict[str, float]] = {mode: {} for mode in modes}
    probes = [coarse.probe(final[row][None], options.nprobe)[1][0] for row in chosen]
    for mode, (predict, checkpoints) in modes.items():
        for budget in BUDGETS:
            each = [replay(coarse, extents, probed, budget * float(extents[probed].sum()), predict, int(row), checkpoints)
                    for row, probed in zip(chosen, probes, strict=True)]  # fmt: skip
            shares[mode][str(budget)] = round(float(np.mean(each)), 4)

    print(f"{'bytes moved / bytes probed':28}" + "".join(f"{budget:>8}" for budget in BUDGETS))
    for mode, values in shares.items():
        print(f"{mode:28}" + "".join(f"{values[str(budget)]:8.3f}" for budget in BUDGETS))
    if options.output:
        from telerag_cli.bench_record import record

        figure = {"what": f"Probed lists already moved at the join, moving as many bytes as are probed ({len(chosen)} questions, "
                          f"{options.nprobe} of {options.nlist} lists)",
                  "value": f"{shares['refined']['1.0']:.2f} refined", "goal": "at least 0.80",
                  "against": f"{shares['question']['1.0']:.2f} with the question only"}  # fmt: skip
        result = record(shlex.join(["python", *sys.argv]), questions=len(chosen), nlist=options.nlist, nprobe=options.nprobe,
                        vectors=len(background) * (options.copies + 1), resident_share=shares, figures=[figure])  # fmt: skip
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
