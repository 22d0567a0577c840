"""Scoring lists in the arena on the GPU: bounds for all vectors, and the best of them once more by Faiss.

Only the places of some ``2 k`` candidates a query come back. Faiss scores them in the slow tier, where they lie too,
and a result is given when the k-th score is better than the bound of the best vector that is no candidate. So the
result is Faiss's, bit for bit, whatever the device rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from telerag_cli.arrays import FloatArray, IntArray, TableArray
from telerag_cli.config import Metric, Storage
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import ListScorer, merge, nothing
from telerag_cli.tiers.cuda.gpu import Gpu
from telerag_cli.tiers.cuda.reference import Launch, decoding_error

NUMBERS = {Storage.FLOAT32: torch.float32, Storage.FLOAT16: torch.float16, Storage.INT8: torch.uint8}
WORKSPACE_BYTES = 64 << 20
"""For the bounds of one launch; longer work is done in several."""


def workspace_bytes(index: Index) -> int:
    """What scoring needs on the device beside the arena: at least one list must be scored at a time."""
    return max(WORKSPACE_BYTES, 4 * int(index.sizes.max(initial=1)))


class GpuScorer:
    """A `Scorer` over an arena on a GPU."""

    def __init__(
        self,
        gpu: Gpu,
        index: Index,
        arena: torch.Tensor,
        exact: ListScorer,
        launch: Callable[[Launch], None],
        workspace: torch.Tensor,
    ) -> None:
        """Begin with nothing in the arena.

        Arena and workspace (at least `workspace_bytes`) are uint8 on the device; ``exact`` scores in the slow tier, and
        ``launch`` is the kernel or its reference.
        """
        manifest = index.manifest
        self.table: TableArray = np.zeros((manifest.nlist, 3), np.uint64)
        self._gpu = gpu
        self._metric = manifest.metric
        self._vectors = arena[: len(arena) // 4 * 4].view(NUMBERS[manifest.storage])
        self._number_bytes = self._vectors.element_size()
        self._exact = exact
        self._launch = launch
        self._workspace = workspace[: len(workspace) // 4 * 4].view(torch.float32)
        ranges = np.zeros((2, 1), np.float32) if index.trained is None else index.trained.reshape(2, -1)
        self._low, self._step = torch.from_numpy(ranges).to(gpu.device).contiguous()
        self._quantized = manifest.storage is Storage.INT8

    def close(self) -> None:
        """Let go of the device's memory."""
        del self._vectors, self._workspace

    def score(self, queries: FloatArray, lists: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """See `FastTier.score`."""
        scores, rows = nothing(len(queries), k, self._metric)
        with self._gpu.working():
            for some, part in self._parts(lists):
                found = self._score(np.ascontiguousarray(queries[some]), part, k)
                scores[some], rows[some] = merge((scores[some], rows[some]), found, k, self._metric)
        return scores, rows

    def _parts(self, lists: IntArray) -> Iterator[tuple[slice, IntArray]]:
        """Cut the work into some queries at a time, or some of the lists of one, so that each fits the workspace."""
        room = len(self._workspace)
        sizes = self._sizes(lists)
        totals = sizes.sum(axis=1)
        start = 0
        while start < len(lists):
            stop = start + 1
            while stop < len(lists) and (stop + 1 - start) * totals[start : stop + 1].max() <= room:
                stop += 1
            if totals[start] <= room:
                yield slice(start, stop), lists[start:stop]
            else:
                piece = (np.cumsum(sizes[start]) - 1) // (room - int(sizes[start].max()) + 1)
                for number in np.unique(piece):
                    yield slice(start, stop), lists[start:stop, piece == number]
            start = stop

    def _sizes(self, lists: IntArray) -> IntArray:
        sizes: IntArray = np.where(lists >= 0, self.table[lists, 0].astype(np.int64), 0)
        return sizes

    def _score(self, queries: FloatArray, lists: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        sizes = self._sizes(lists)
        totals = sizes.sum(axis=1)
        columns = np.cumsum(sizes, axis=1) - sizes
        width = int(totals.max(initial=0))
        scores, rows = nothing(len(queries), k, self._metric)
        if width == 0:
            return scores, rows
        bounds = self._bounds(queries, lists, sizes, columns, width)
        undecided = np.arange(len(queries))
        wanted = 2 * k + 8
        while len(undecided):
            wanted = min(wanted, width)
            all_open = len(undecided) == len(queries)
            rows_open = bounds if all_open else bounds[torch.from_numpy(undecided).to(bounds.device)]
            top = torch.topk(rows_open, wanted, dim=1)
            limits, places = top.values[:, -1].cpu().numpy(), top.indices.cpu().numpy()
            decided = np.empty(len(undecided), np.bool_)
            for position, query in enumerate(undecided.tolist()):
                known = places[position][places[position] < totals[query]]
                which = np.searchsorted(columns[query], known, side="right") - 1
                exact, exact_rows = self._exact.score_some(
                    queries[query], lists[query, which], known - columns[query, which]
                )
                one = nothing(1, k, self._metric)
                one = merge(one, (exact[None], exact_rows[None]), k, self._metric)
                scores[query], rows[query] = one[0][0], one[1][0]
                worst = scores[query, -1] if self._metric is Metric.IP else -scores[query, -1]
                decided[position] = wanted >= totals[query] or worst > limits[position]
            undecided = undecided[~decided]
            wanted *= 4
        return scores, rows

    def _bounds(
        self, queries: FloatArray, lists: IntArray, sizes: IntArray, columns: IntArray, width: int
    ) -> torch.Tensor:
        """The bounds of all vectors of each query's lists, float32 (n, width), on the device."""
        device = self._gpu.device
        query_of, place = np.nonzero(sizes)
        # The same list's pairs side by side, so that it is read from memory once and from the cache after that.
        order = np.argsort(lists[query_of, place], kind="stable")
        query_of, place = query_of[order], place[order]
        host_sizes = sizes[query_of, place]
        first = self.table[lists[query_of, place], 2].astype(np.int64) // self._number_bytes
        pairs = torch.from_numpy(np.stack([query_of, first, host_sizes, columns[query_of, place]])).to(device)
        bounds = self._workspace[: len(queries) * width].view(len(queries), width)
        bounds.fill_(-torch.inf)
        asked = torch.from_numpy(queries).to(device)
        l2 = self._metric is Metric.L2
        absolute = (
            decoding_error(asked, self._low, self._step, l2=l2)
            if self._quantized
            else torch.zeros(len(queries), device=device)
        )
        work = Launch(self._vectors, asked, self._low, self._step, pairs, bounds, absolute, l2, host_sizes)
        self._launch(work)
        return bounds
