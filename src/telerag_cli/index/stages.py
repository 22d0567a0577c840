"""The stages of building that blocks of vectors go through, here or in other processes: assigning and placing.

A stage is a frozen dataclass that says what it works on and is pickled; called, it opens that and returns what does
the work for a `RowSpan` of rows. What comes out depends on the rows alone, so it may be done anywhere and twice.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from telerag_cli.arrays import FloatArray, IntArray, TableArray
from telerag_cli.config import Metric, Storage
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.errors import InputError, ResourceError
from telerag_cli.files import sized, write_at
from telerag_cli.index.artifact import ID_BYTES, IndexPaths, lay_out_vectors
from telerag_cli.index.assign import Assigner
from telerag_cli.index.partial import save_array
from telerag_cli.index.recall import Nearest, NearestInBlock
from telerag_cli.index.scoring import scalar_quantizer
from telerag_cli.progress import WorkerPool

ASSIGN_ROWS = 16384
"""Rows assigned at a time. Fixed, not from the memory given: where a block ends may show in the last bit of a score."""
MAX_BLOCKS = 64
"""Blocks of a span for another process."""
MAX_FLOAT16 = float(np.finfo(np.float16).max)

Encode = Callable[[FloatArray], npt.NDArray[np.uint8]]
R = TypeVar("R")


@dataclass(frozen=True)
class RowSpan:
    """Rows to work on, and what is known of the rows before them."""

    first: int
    end: int
    known: npt.NDArray[Any]
    """Assigning: `Nearest.least`; placing: vectors in each list so far."""

    def blocks(self, embeddings: Embeddings, rows: int) -> Generator[tuple[int, FloatArray]]:
        """The first row and the vectors of each block of ``rows``; what lies behind the span is not read."""
        for first, block in embeddings.batches(min(rows, self.end - self.first), self.first):
            yield first, block[: self.end - first]
            if first + len(block) >= self.end:
                return


@dataclass(frozen=True)
class BuildStage(Generic[R]):
    """What is done with spans of rows, ``block_rows`` at a time, while the index grows in ``draft``."""

    embeddings: Embeddings
    draft: Path
    block_rows: int

    def __call__(self) -> Callable[[RowSpan], Iterator[R]]:
        """Return what yields a result for each block of a span."""
        raise NotImplementedError


def run_stage(
    stage: BuildStage[R], start: int, known: Callable[[int, int], npt.NDArray[Any]], pool: WorkerPool | None
) -> Generator[R]:
    """Yield the results of all blocks from row ``start`` on, in order, made here or by the processes of a pool.

    ``known`` says what is known before the span from one row to another; it is asked in the order of the rows.
    """
    rows = stage.embeddings.rows
    if pool is None:
        yield from stage()(RowSpan(start, rows, known(start, rows)))
        return
    # Row groups are read from their start: a span is so many blocks that nothing is read in vain.
    largest = max(max(shard.group_rows, default=0) for shard in stage.embeddings.shards)
    step = stage.block_rows * max(1, min(MAX_BLOCKS, largest // stage.block_rows))
    ends = ((first, min(first + step, rows)) for first in range(start, rows, step))
    spans = (RowSpan(first, end, known(first, end)) for first, end in ends)
    with contextlib.closing(pool(spans, partial(_in_worker, stage))) as results:
        for part in results:
            yield from part


def _in_worker(stage: BuildStage[R]) -> Callable[[RowSpan], list[R]]:
    if not IndexPaths(stage.draft).centroids.exists():
        raise ResourceError(
            f"A worker does not see {stage.draft} with what is in it.",
            remedy="Choose an --output on a file system that all machines share.",
        )
    work = stage()
    return lambda span: list(work(span))


def read_assignments(draft: Path) -> npt.NDArray[np.int32]:
    """The list of each row, memory-mapped."""
    return np.memmap(assignments_path(draft), np.int32, "r")


def assignments_path(draft: Path) -> Path:
    """The file of the list of each row: int32, one after another."""
    return draft / "work" / "assignments.i32"


def held_out(draft: Path, metric: Metric) -> Nearest:
    """The queries that recall is measured with, with no answers yet."""
    with np.load(draft / "work" / "queries.npz") as saved:
        return Nearest(saved["vectors"], saved["rows"], metric)


@dataclass(frozen=True)
class Assigning(BuildStage[tuple[npt.NDArray[np.int32], NearestInBlock]]):
    """Finds the nearest list of rows, (n,) of each block, and the best of them for the held-out queries.

    Its work raises `InputError` if a vector cannot be used.
    """

    metric: Metric
    halves: bool
    """Whether something of the vectors will be stored in float16."""

    def __call__(self) -> Callable[[RowSpan], Iterator[tuple[npt.NDArray[np.int32], NearestInBlock]]]:
        """Open the centroids and the held-out queries."""
        nearest_lists = Assigner(np.load(IndexPaths(self.draft).centroids), self.metric)

        def work(span: RowSpan) -> Iterator[tuple[npt.NDArray[np.int32], NearestInBlock]]:
            truth = held_out(self.draft, self.metric)
            with contextlib.closing(span.blocks(self.embeddings, self.block_rows)) as blocks:
                for first, block in blocks:
                    lists = nearest_lists(block)
                    self._check(first, block, lists)
                    found = truth.found(first, block, np.maximum(span.known, truth.least))
                    truth.merge(found)
                    yield lists.astype(np.int32), found

        return work

    def _check(self, first: int, block: FloatArray, lists: IntArray) -> None:
        if self.halves and np.abs(block).max() > MAX_FLOAT16:
            row = first + int(np.abs(block).max(axis=1).argmax())
            raise InputError(
                f"The vector in row {row:,} holds {np.abs(block).max():g}, and float16 ends at {MAX_FLOAT16:g}.",
                remedy="Choose another type than float16 for --storage and --keep-vectors.",
            )
        if (lists < 0).any():
            row = int(np.flatnonzero(lists < 0)[0])
            length = np.linalg.norm(block[row].astype(np.float64))
            raise InputError(
                f"The vector in row {first + row:,} is {length:.3g} long, and its distance to any list exceeds "
                "float32.",
                remedy="Scale the vectors down.",
            )


@dataclass(frozen=True)
class Placing(BuildStage[int]):
    """Writes rows' codes and numbers where the sizes of the lists say; rows of a list keep their order."""

    storage: Storage
    keep_vectors: str

    def prepare(self, table: TableArray, lists_bytes: int) -> None:
        """Give the files their sizes; what is in them stays."""
        paths = IndexPaths(self.draft)
        if not paths.offsets.exists():
            save_array(paths.offsets, table)
        with sized(paths.lists, lists_bytes):
            pass
        header, vector_bytes = self._vectors_layout
        if header:
            with sized(paths.vectors, len(header) + self.embeddings.rows * vector_bytes) as vectors:
                write_at(vectors, memoryview(header), 0)

    @property
    def _vectors_layout(self) -> tuple[bytes, int]:
        return lay_out_vectors(self.embeddings.rows, self.embeddings.dimension, self.keep_vectors)

    def __call__(self) -> Callable[[RowSpan], Iterator[int]]:
        """Open what rows are placed by; what is returned yields the end of the rows that are on the disk."""
        paths = IndexPaths(self.draft)
        table: TableArray = np.load(paths.offsets)
        ranges = np.load(paths.quantizer) if self.storage is Storage.INT8 else None
        encode, lists = encoder(self.embeddings.dimension, self.storage, ranges), read_assignments(self.draft)

        def work(span: RowSpan) -> Iterator[int]:
            filled = span.known.copy()
            synced: Future[list[None]] | None = None
            end = span.first
            with contextlib.ExitStack() as stack:
                blocks = stack.enter_context(contextlib.closing(span.blocks(self.embeddings, self.block_rows)))
                written = (paths.lists, paths.vectors) if self.keep_vectors else (paths.lists,)
                files = [stack.enter_context(sized(path)) for path in written]
                disk = stack.enter_context(ThreadPoolExecutor(1))
                for first, block in blocks:
                    if self.keep_vectors:
                        header, vector_bytes = self._vectors_layout
                        kept = block.astype(self.keep_vectors, copy=False)
                        write_at(files[1], kept.data.cast("B"), len(header) + first * vector_bytes)
                    _place(encode, block, first, lists[first : first + len(block)], table, filled, files[0])
                    # What was written is on disk before it is counted as done; meanwhile the next block is placed.
                    if synced is not None:
                        synced.result()
                        yield end
                    end = first + len(block)
                    synced = disk.submit(lambda: list(map(os.fdatasync, files)))
                if synced is not None:
                    synced.result()
                    yield end

        return work


def _place(
    encode: Encode,
    block: FloatArray,
    first: int,
    chosen: npt.NDArray[np.int32],
    table: TableArray,
    filled: IntArray,
    file: int,
) -> None:
    """Write a block; ``filled``, vectors in each list before it, (nlist,), counts them afterwards."""
    order = np.argsort(chosen, kind="stable")
    codes, rows = encode(block)[order], first + order
    size = codes.shape[1]
    present, begin, count = np.unique(chosen[order], return_index=True, return_counts=True)
    _, capacity, offset = table[present].astype(np.int64).T
    code_places = offset + filled[present] * size
    row_places = offset + capacity * size + filled[present] * ID_BYTES
    code_bytes, row_bytes = codes.data.cast("B"), rows.view(np.uint8).data.cast("B")
    for low, high, code_place, row_place in zip(
        begin.tolist(), (begin + count).tolist(), code_places.tolist(), row_places.tolist(), strict=True
    ):
        write_at(file, code_bytes[low * size : high * size], code_place)
        write_at(file, row_bytes[low * ID_BYTES : high * ID_BYTES], row_place)
    filled[present] += count


def encoder(dimension: int, storage: Storage, trained: FloatArray | None) -> Encode:
    """Return what makes codes of vectors: (n, dimension) float32 to (n, code_size) uint8."""
    if storage is Storage.FLOAT32:
        return lambda block: block.view(np.uint8)
    encode: Encode = scalar_quantizer(dimension, storage, trained).compute_codes
    return encode
