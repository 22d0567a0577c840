"""Faiss over memory that we own: the same scanner, the same bits, no copy."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from telerag_cli.arrays import ByteArray, FloatArray, IntArray, TableArray
from telerag_cli.config import Metric, Storage
from telerag_cli.index.artifact import ID_BYTES, Index
from telerag_cli.index.npy import ArrayRows

BLOCK_BYTES = 8 << 20
"""Bytes of lists that several queries are scored against before the next ones: less than a processor's last cache."""
COARSE_BLOCK = 16
"""Queries per call of the coarse quantizer. Faiss turns to BLAS, and other roundings, at 20 queries; staying below
makes a query's probes independent of what it is batched with."""
SCALAR_KINDS = {Storage.FLOAT16: faiss.ScalarQuantizer.QT_fp16, Storage.INT8: faiss.ScalarQuantizer.QT_8bit}


def faiss_metric(metric: Metric) -> int:
    """Faiss's number for a metric."""
    return int(faiss.METRIC_INNER_PRODUCT if metric is Metric.IP else faiss.METRIC_L2)


def empty_ivf(
    quantizer: Any, dimension: int, nlist: int, metric: Metric, storage: Storage, trained: FloatArray | None = None
) -> Any:
    """A ``faiss.IndexIVF`` of this storage with no lists; codes are of the vector itself, not of its residual."""
    number = faiss_metric(metric)
    if storage is Storage.FLOAT32:
        index = faiss.IndexIVFFlat(quantizer, dimension, nlist, number)
        index.is_trained = True
        return index
    index = faiss.IndexIVFScalarQuantizer(quantizer, dimension, nlist, SCALAR_KINDS[storage], number, False)
    if trained is not None:
        faiss.copy_array_to_vector(np.ascontiguousarray(trained), index.sq.trained)
    index.is_trained = storage is Storage.FLOAT16 or trained is not None
    return index


def scalar_quantizer(dimension: int, storage: Storage, trained: FloatArray | None = None) -> Any:
    """A ``faiss.ScalarQuantizer`` of ``float16`` or ``int8``, as it is inside `empty_ivf`."""
    quantizer = faiss.ScalarQuantizer(dimension, SCALAR_KINDS[storage])
    if trained is not None:
        faiss.copy_array_to_vector(np.ascontiguousarray(trained), quantizer.trained)
    return quantizer


def faiss_threads() -> int:
    """Number of threads that Faiss scores with."""
    return int(faiss.omp_get_max_threads())


def flat(centroids: FloatArray, metric: Metric) -> Any:
    """A ``faiss.IndexFlat`` of the centroids."""
    quantizer = faiss.IndexFlat(centroids.shape[1], faiss_metric(metric))
    quantizer.add(np.ascontiguousarray(centroids))
    return quantizer


class Coarse:
    """The coarse quantizer: which lists are nearest to a query."""

    def __init__(self, centroids: FloatArray, metric: Metric) -> None:
        self.index = flat(centroids, metric)
        self.nlist, self.dimension = centroids.shape

    def probe(self, queries: FloatArray, nprobe: int) -> tuple[FloatArray, IntArray]:
        """Scores and numbers of the ``nprobe`` nearest lists, nearest first, each of shape (n, nprobe)."""
        blocks = [
            self.index.search(np.ascontiguousarray(queries[i : i + COARSE_BLOCK]), nprobe)
            for i in range(0, len(queries), COARSE_BLOCK)
        ]
        scores, lists = (np.concatenate(part) for part in zip(*blocks, strict=True))
        return scores, lists

    def nearest(self, queries: FloatArray, count: int) -> IntArray:
        """The ``count`` nearest lists of each query, nearest first: (n, count)."""
        return self.probe(queries, count)[1]

    def rank(self, query: FloatArray) -> IntArray:
        """All lists, nearest first, for one query of shape (dimension,)."""
        ranking: IntArray = self.probe(query[None], self.nlist)[1][0]
        return ranking


class ListScorer:
    """Scores lists that lie in a block of host memory, wherever its table says.

    ``table`` is Faiss's own vector of (size, capacity, offset), viewed as a uint64 array of shape (nlist, 3) and edited
    as lists come and go; an entry must not change while a search that names its list is running.
    """

    def __init__(
        self,
        memory: ByteArray,
        coarse: Coarse,
        metric: Metric,
        storage: Storage,
        code_size: int,
        trained: FloatArray | None,
    ) -> None:
        self._memory = memory  # Faiss keeps only the address
        self.metric = metric
        self._coarse = coarse
        nlist = coarse.nlist
        self._lists = faiss.OnDiskInvertedLists()
        self._lists.nlist = nlist
        self._lists.code_size = code_size
        self._lists.read_only = True
        self._lists.lists.resize(nlist)
        self._lists.ptr = faiss.swig_ptr(memory)
        self._lists.totsize = len(memory)
        address = int(self._lists.lists.data().this)
        words = (ctypes.c_uint64 * (3 * nlist)).from_address(address)
        self.table: TableArray = np.ctypeslib.as_array(words).reshape(nlist, 3)
        self.table[:] = 0
        self._ivf = empty_ivf(coarse.index, coarse.dimension, nlist, metric, storage, trained)
        self._ivf.replace_invlists(self._lists, False)
        # Over probes, not over queries: the default runs a single query on a single thread.
        self._ivf.parallel_mode = 1
        # One for good: the wrapper never frees what this makes.
        self._scanner = self._ivf.get_InvertedListScanner(False, None, None)
        self._scanning = threading.Lock()

    @classmethod
    def over(cls, memory: ByteArray, index: Index, coarse: Coarse) -> ListScorer:
        """A scorer of an index's lists in some memory, none of which is there yet."""
        manifest = index.manifest
        return cls(memory, coarse, manifest.metric, manifest.storage, manifest.code_size, index.trained)

    def close(self) -> None:
        """Let go of the memory; Faiss would otherwise unmap it when the lists are freed."""
        self._lists.ptr = None
        self._lists.totsize = 0

    def score(self, queries: FloatArray, lists: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """The ``k`` best (score, row) of the named lists for each query, best first, equal scores by row.

        Queries (n, dimension) and lists (n, m), -1 to skip, give scores and rows (n, k); missing places hold the worst
        score and row -1.
        """
        if len(queries) == 1:
            return self._score(queries, lists, k)
        scores, rows = nothing(len(queries), k, self.metric)
        for who, keys in self._blocks(lists):
            found = self._score(queries[who], keys, k)
            scores[who], rows[who] = merge((scores[who], rows[who]), found, k, self.metric)
        return scores, rows

    def _blocks(self, lists: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
        """A few lists at a time, for all queries that want one of them: their numbers (m,), and the lists of each.

        Faiss takes one query after the other through all its lists. What one has just brought into the processor's
        cache is there for the next only if it is not too much.
        """
        distinct = np.unique(lists[lists >= 0])
        ends = np.cumsum(self.table[distinct, 1].astype(np.int64) * (int(self._lists.code_size) + ID_BYTES))
        block_of = np.full(len(self.table) + 1, -1, np.int64)  # the last one is for -1
        block_of[distinct] = (ends - 1) // BLOCK_BYTES
        blocks = block_of[lists]
        for block in np.unique(blocks[blocks >= 0]).tolist():
            wanted = blocks == block
            who = np.flatnonzero(wanted.any(axis=1))
            keys = -np.sort(-np.where(wanted[who], lists[who], -1), axis=1)
            yield who, keys[:, : int(wanted.sum(axis=1).max())]

    def _score(self, queries: FloatArray, lists: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        width = k + 1
        while True:
            scores, rows = self._scan(queries, lists, width)
            # Faiss keeps whichever of equal scores it met first; widen until the last place ties with none that counts.
            tied = (rows[:, k - 1] >= 0) & (rows[:, -1] >= 0) & (scores[:, k - 1] == scores[:, -1])
            if not tied.any():
                return best(scores, rows, k, self.metric)
            width *= 2

    def score_some(self, query: FloatArray, lists: IntArray, places: IntArray) -> tuple[FloatArray, IntArray]:
        """Scores and rows (m,), as `score` gives them, of vectors by their ``lists`` and ``places`` in these, (m,)."""
        query = np.ascontiguousarray(query, np.float32)
        code_bytes = int(self._lists.code_size)
        table = self.table[lists].astype(np.int64)
        begins = table[:, 2] + places * code_bytes
        codes = [faiss.swig_ptr(self._memory[begin : begin + code_bytes]) for begin in begins.tolist()]
        with self._scanning:
            self._scanner.set_query(faiss.swig_ptr(query))
            # Codes are of the vectors themselves, so any list will do; some scanners take the query only now.
            self._scanner.set_list(0, 0.0)
            scores = np.array([self._scanner.distance_to_code(code) for code in codes], np.float32)
        rows = self._memory.view(np.int64)[(table[:, 2] + table[:, 1] * code_bytes) // 8 + places]
        return scores, rows

    def _scan(self, queries: FloatArray, lists: IntArray, width: int) -> tuple[FloatArray, IntArray]:
        n, probes = lists.shape
        scores = np.empty((n, width), np.float32)
        rows = np.empty((n, width), np.int64)
        queries = np.ascontiguousarray(queries, np.float32)
        lists = np.ascontiguousarray(lists, np.int64)
        unused = np.zeros(lists.shape, np.float32)  # only residual codes need the distance to the centroid
        self._ivf.search_preassigned_c(
            n,
            faiss.swig_ptr(queries),
            width,
            faiss.swig_ptr(lists),
            faiss.swig_ptr(unused),
            faiss.swig_ptr(scores),
            faiss.swig_ptr(rows),
            False,
            faiss.SearchParametersIVF(nprobe=probes),
        )
        return scores, rows


def best(scores: FloatArray, rows: IntArray, k: int, metric: Metric) -> tuple[FloatArray, IntArray]:
    """The ``k`` best of candidates (n, m) by (score, row); absent ones have row -1 and come last."""
    last = np.iinfo(np.int64).max
    keys = np.where(rows < 0, last, rows)
    order = np.lexsort((keys, -scores if metric is Metric.IP else scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def merge(
    some: tuple[FloatArray, IntArray], others: tuple[FloatArray, IntArray], k: int, metric: Metric
) -> tuple[FloatArray, IntArray]:
    """The ``k`` best of two sets of candidates, (n, m1) and (n, m2); absent ones fill up."""
    scores, rows = (np.concatenate([one, other], axis=1) for one, other in zip(some, others, strict=True))
    return best(scores, rows, k, metric)


def nothing(n: int, k: int, metric: Metric) -> tuple[FloatArray, IntArray]:
    """No result in each of ``k`` places of ``n`` queries: row -1 and the worst finite score, as Faiss has it."""
    limits = np.finfo(np.float32)
    worst = limits.min if metric is Metric.IP else limits.max
    return np.full((n, k), worst, np.float32), np.full((n, k), -1, np.int64)


def score_again(
    queries: FloatArray, rows: IntArray, vectors: npt.NDArray[Any] | ArrayRows, k: int, metric: Metric
) -> tuple[FloatArray, IntArray]:
    """The ``k`` best of candidates by their scores against the vectors themselves, as ``faiss.IndexRefine`` does it.

    Queries (n, dimension) and candidates' rows (n, m), -1 for none, give scores and rows (n, k), k at most m. Of the
    vectors (ntotal, dimension), of any float type, only the candidates are read.
    """
    scores, _rows = nothing(len(rows), rows.shape[1], metric)
    for query, candidates, out in zip(queries, rows, scores, strict=True):
        known = candidates >= 0
        held = vectors[candidates[known]].astype(np.float32)
        # Sums along a row do not depend on what other rows there are, as a product of matrices would.
        out[known] = (held * query).sum(axis=1) if metric is Metric.IP else np.square(held - query).sum(axis=1)
    return best(scores, rows, k, metric)
