"""Which list each vector belongs to, found faster than by a search of the coarse quantizer, and equal to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from telerag_cli import system
from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.config import Metric
from telerag_cli.index.scoring import flat

LANES = 64
"""Lists are looked at in so many interleaved groups: a maximum over rows of this width is vector instructions only."""
MIN_LISTS = 8 * LANES
"""Below this, Faiss is quick enough."""
ROWS = 2048
"""Vectors multiplied at a time; their scores stay in the cache."""
MAX_CANDIDATES = 16
"""Lists to look at again per vector, on average; beyond it the short type tells too little."""
UNIT = 2.0**-9
"""Relative rounding error of bfloat16."""


class Assigner:
    """The nearest list of vectors: in bfloat16 first, then again in float32 among those that its error leaves open.

    On a processor that multiplies bfloat16 itself the first step is several times faster than float32, and leaves
    little more than one list per vector open. Elsewhere, and for vectors whose scores the short type cannot tell apart,
    Faiss does it.

    The bound: nearness is ``t = x.c + b`` (b is 0, or ``-c.c / 2`` for L2). Rounding the factors to bfloat16 moves
    ``x.c`` by at most ``2 u |x||c|``, rounding ``b`` by ``u |b|``, rounding sum and result by ``2 u (|x||c| + |b|)``,
    with u = 2^-9; and ``4 u (|x| max|c| + max|b|)``, a little enlarged for float32's own errors, bounds them all. So
    the nearest list scores within twice that of the best score.
    """

    def __init__(self, centroids: FloatArray, metric: Metric) -> None:
        self._centroids, self._metric = centroids, metric
        self._faiss = flat(centroids, metric)
        self._torch: Any = None
        if system.computes_bfloat16() and len(centroids) >= MIN_LISTS:
            self._prepare()

    def _prepare(self) -> None:
        import torch

        self._torch = torch
        nlist = len(self._centroids)
        squares = np.einsum("ij,ij->i", self._centroids, self._centroids)
        self._bias = -squares / 2 if self._metric is Metric.L2 else np.zeros(nlist, np.float32)
        self._longest, self._largest_bias = float(np.sqrt(squares.max())), float(np.abs(self._bias).max())
        # Columns are filled up with the last list again.
        columns = np.minimum(np.arange(-(-nlist // LANES) * LANES), nlist - 1)
        self._factor = torch.from_numpy(self._centroids[columns]).bfloat16().T.contiguous()
        self._addend = torch.from_numpy(self._bias[columns]).bfloat16()
        self._scores = torch.empty((ROWS, len(columns)), dtype=torch.bfloat16)

    def __call__(self, vectors: FloatArray) -> IntArray:
        """List numbers (n,) of vectors (n, dimension); the lowest of equally near ones."""
        lists = np.empty(len(vectors), np.int64)
        for low in range(0, len(vectors), ROWS):
            part = vectors[low : low + ROWS]
            found = self._nearest(part) if self._torch else None
            lists[low : low + ROWS] = self._faiss.search(part, 1)[1][:, 0] if found is None else found
        return lists

    def _nearest(self, vectors: FloatArray) -> IntArray | None:
        """None if bfloat16 tells too little."""
        torch = self._torch
        x = torch.from_numpy(vectors)
        scores = self._scores[: len(x)]
        if self._metric is Metric.L2:
            torch.addmm(self._addend, x.bfloat16(), self._factor, out=scores)
        else:
            torch.mm(x.bfloat16(), self._factor, out=scores)
        grouped = scores.view(len(x), -1, LANES)
        best = grouped.amax(1)
        error = 4.1 * UNIT * (x.norm(dim=1) * self._longest + self._largest_bias)
        least = best.amax(1).float() - 2 * error
        rows, lanes = (best.float() >= least[:, None]).nonzero(as_tuple=True)
        near, depths = (grouped[rows, :, lanes].float() >= least[rows, None]).nonzero(as_tuple=True)
        rows, lists = rows[near], depths * LANES + lanes[near]
        if len(rows) > MAX_CANDIDATES * len(x):
            return None
        row = rows.numpy()
        number = np.minimum(lists.numpy(), len(self._centroids) - 1)
        exact = np.einsum("ij,ij->i", vectors[row], self._centroids[number]) + self._bias[number]
        order = np.lexsort((number, -exact, row))
        first = np.flatnonzero(np.diff(row[order], prepend=-1))
        # Scores beyond the type's range are not numbers, and leave a vector without a list.
        return number[order][first] if len(first) == len(x) else None
