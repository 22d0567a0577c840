"""Recall@10 of an index on held-out queries, measured in passes over the data that building makes anyway."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import faiss
import numpy as np

from telerag_cli.arrays import FloatArray, IntArray, TableArray
from telerag_cli.config import Metric, Storage
from telerag_cli.files import read_exactly
from telerag_cli.index.artifact import ID_BYTES, code_size
from telerag_cli.index.scoring import COARSE_BLOCK, Coarse, faiss_metric, scalar_quantizer

NEIGHBOURS = 10
NPROBES = (1, 4, 16, 32, 64, 128, 256)
WORST = np.float32(-np.inf)


def closeness(queries: FloatArray, vectors: FloatArray, metric: Metric) -> FloatArray:
    """(queries, vectors): larger is nearer; the inner product, or ``2 q.v - v.v``, which orders as L2 does."""
    scores: FloatArray = queries @ vectors.T
    if metric is Metric.L2:
        scores = 2 * scores - np.einsum("ij,ij->i", vectors, vectors)
    return scores


@dataclass(frozen=True)
class NearestInBlock:
    """The ten best rows of a block, (n, 10) in no order, for the queries of these numbers, (n,)."""

    queries: IntArray
    scores: FloatArray
    rows: IntArray


class Nearest:
    """The exact ten nearest rows of each query, kept while the vectors stream by; a query's own row does not count."""

    def __init__(self, queries: FloatArray, own_rows: IntArray, metric: Metric) -> None:
        self.queries, self.own_rows, self.metric = queries, own_rows, metric
        self.scores = np.full((len(queries), NEIGHBOURS), WORST, np.float32)
        self.rows = np.full((len(queries), NEIGHBOURS), -1, np.int64)

    @property
    def least(self) -> FloatArray:
        """What a score must exceed to count, (queries,): that of the tenth best so far."""
        return self.scores[:, -1].copy()

    def found(self, first: int, vectors: FloatArray, least: FloatArray) -> NearestInBlock:
        """What of these rows may be among the nearest, if ``least`` was `least` at some moment before them."""
        if not len(self.queries):
            return NearestInBlock(np.empty(0, np.int64), self.scores, self.rows)
        scores = closeness(self.queries, vectors, self.metric)
        inside = np.flatnonzero((self.own_rows >= first) & (self.own_rows < first + len(vectors)))
        scores[inside, self.own_rows[inside] - first] = WORST
        # After the first blocks next to nothing passes the tenth best so far, so this costs one comparison per score.
        better = np.flatnonzero((scores > least[:, None]).any(axis=1))
        return NearestInBlock(better, *_best(scores[better], np.arange(first, first + len(vectors))))

    def merge(self, found: NearestInBlock) -> None:
        """Take in what was found in rows after those seen so far."""
        better = found.queries
        self.scores[better], self.rows[better] = _merge(
            self.scores[better], self.rows[better], found.scores, found.rows
        )


class ListRecall:
    """Searches the lists as they are read back from disk: how much of the exact result does each ``nprobe`` find?"""

    def __init__(
        self,
        truth: Nearest,
        coarse: Coarse,
        path: Path,
        table: TableArray,
        storage: Storage,
        trained: FloatArray | None,
    ) -> None:
        self._truth, self._path, self._table = truth, path, table
        self._code_size = code_size(coarse.dimension, storage)
        self._decoder = None if storage is Storage.FLOAT32 else scalar_quantizer(coarse.dimension, storage, trained)
        self.nprobes = [n for n in NPROBES if n < coarse.nlist]
        self.nprobes += [coarse.nlist] if coarse.nlist <= NPROBES[-1] else []
        count, depth = len(truth.queries), self.nprobes[-1]
        self._wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
        if count:
            for query, lists in enumerate(coarse.probe(truth.queries, depth)[1]):
                for rank, number in enumerate(lists.tolist()):
                    self._wanted[number].append((query, rank))
        self._scores = np.full((count, depth, NEIGHBOURS), WORST, np.float32)
        self._rows = np.full((count, depth, NEIGHBOURS), -1, np.int64)
        self._metric = faiss_metric(truth.metric)
        self._file: IO[bytes] | None = None
        self._threads = 0

    def __enter__(self) -> ListRecall:
        self._file = self._path.open("rb", buffering=0)
        # A list is a fraction of a millisecond's work for one thread; to wake and join others takes longer.
        self._threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()
        faiss.omp_set_num_threads(self._threads)

    def on_codes(self, number: int, place: int, codes: bytes) -> None:
        """Score a block of a list's codes for the queries that probe it."""
        if number not in self._wanted:
            return
        assert self._file is not None
        _, capacity, offset = (int(value) for value in self._table[number])
        count = len(codes) // self._code_size
        where = offset + capacity * self._code_size + place * ID_BYTES
        rows = np.frombuffer(read_exactly(self._file.fileno(), count * ID_BYTES, where, self._path), np.int64)
        queries, ranks = np.array(self._wanted[number]).T
        held = np.frombuffer(codes, np.uint8).reshape(-1, self._code_size)
        vectors = held.view(np.float32) if self._decoder is None else self._decoder.decode(held)
        # One more than counts, for the query's own row.
        width = min(NEIGHBOURS + 1, count)
        blocks = [
            faiss.knn(self._truth.queries[queries[i : i + COARSE_BLOCK]], vectors, width, metric=self._metric)
            for i in range(0, len(queries), COARSE_BLOCK)
        ]
        scores, found = (np.concatenate(part) for part in zip(*blocks, strict=True))
        found = rows[found]
        scores = scores if self._truth.metric is Metric.IP else -scores
        scores[found == self._truth.own_rows[queries][:, None]] = WORST
        self._scores[queries, ranks], self._rows[queries, ranks] = _merge(
            self._scores[queries, ranks], self._rows[queries, ranks], scores, found
        )

    def result(self) -> dict[str, float]:
        """Recall@10 by ``nprobe``, where what ties with the tenth counts too; empty without queries or neighbours."""
        count = len(self._scores)
        asked = int((self._truth.rows >= 0).sum())
        if not asked:
            return {}
        recalls = {}
        for nprobe in self.nprobes:
            scores = self._scores[:, :nprobe].reshape(count, -1)
            rows = self._rows[:, :nprobe].reshape(count, -1)
            tenth = -np.partition(-scores, NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1 : NEIGHBOURS]
            found = np.where(scores >= tenth, rows, -1)
            hits = sum(len(np.intersect1d(a[a >= 0], b)) for a, b in zip(self._truth.rows, found, strict=True))
            recalls[str(nprobe)] = round(hits / asked, 4)
        return recalls


def _best(scores: FloatArray, rows: IntArray) -> tuple[FloatArray, IntArray]:
    """The ten best (or all, if fewer) of each query's scores (n, m) for ``rows`` (m,), in no order: (n, 10) each."""
    if scores.shape[1] <= NEIGHBOURS:
        return scores, np.broadcast_to(rows, scores.shape)
    top = np.argpartition(scores, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:]
    return np.take_along_axis(scores, top, 1), rows[top]


def _merge(
    scores: FloatArray, rows: IntArray, more_scores: FloatArray, more_rows: IntArray
) -> tuple[FloatArray, IntArray]:
    """The ten best of both, (n, 10) each, best first, equal scores by row; absent rows (-1) have the worst score."""
    both, numbers = np.concatenate([scores, more_scores], 1), np.concatenate([rows, more_rows], 1)
    numbers[both == WORST] = -1
    order = np.lexsort((numbers, -both), axis=-1)[:, :NEIGHBOURS]
    return np.take_along_axis(both, order, 1), np.take_along_axis(numbers, order, 1)
