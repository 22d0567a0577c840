"""The parts of building that blocks of vectors go through, here or in other processes: assigning and placing.

A part is a frozen dataclass that says what it works on and is pickled; called, it opens that and returns what does the
work: for a `Span` whose vectors it reads itself, or, where the vectors pass by anyway, for a block of them. What comes
out depends on the block alone, so that it may be done anywhere and twice.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from telerag_cli.arrays import ByteArray, FloatArray, IntArray, TableArray
from telerag_cli.config import Metric, Storage
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.errors import InputError, ResourceError
from telerag_cli.index.artifact import ID_BYTES, IndexPaths, lay_out_vectors
from telerag_cli.index.assign import Assigner
from telerag_cli.index.partial import save_array, sized, write_at
from telerag_cli.index.recall import Found, Nearest
from telerag_cli.index.scoring import empty_ivf, flat

ASSIGN_ROWS = 16384
"""Rows assigned at a time. Fixed, not from the memory given: where a block ends may show in the last bit of a score."""
MAX_BLOCKS = 64
"""Blocks of a span at most."""
MAX_FLOAT16 = float(np.finfo(np.float16).max)

Encode = Callable[[FloatArray], ByteArray]
T = TypeVar("T")
R = TypeVar("R")


class Pool(Protocol):
    """Processes to work in, instead of this one."""

    @property
    def workers(self) -> int:
        """How many."""

    def __call__(self, items: Iterable[T], make_worker: Callable[[], Callable[[T], R]]) -> Generator[R]:
        """Results in the order of the items; each process calls ``make_worker`` once."""


@dataclass(frozen=True)
class Span:
    """Rows for one worker to do, and what it needs to know of the rows before them."""

    first: int
    end: int
    known: npt.NDArray[Any]
    """Assigning: `Nearest.least`; placing: vectors in each list so far."""


def _blocks(embeddings: Embeddings, rows: int, span: Span) -> Generator[tuple[int, FloatArray]]:
    """The vectors of a span in blocks of ``rows``; what lies behind it is not read."""
    for first, block in embeddings.batches(min(rows, span.end - span.first), span.first):
        yield first, block[: span.end - first]
        if first + len(block) >= span.end:
            return


def span_rows(embeddings: Embeddings, block_rows: int) -> int:
    """Rows of a span: a block, or so many that a row group of the Parquet files, read from its start, is not read in vain."""
    largest = max(max(shard.group_rows, default=0) for shard in embeddings.shards)
    return block_rows * max(1, min(MAX_BLOCKS, largest // block_rows))


@dataclass(frozen=True)
class Assigned:
    """Of a block: its lists, (n,), and what of it may be among the exact answers to the held-out queries."""

    first: int
    lists: npt.NDArray[np.int32]
    found: Found


@dataclass(frozen=True)
class Assigning:
    """Finds the nearest list of rows, and the best of them for the held-out queries."""

    embeddings: Embeddings
    partial: Path
    metric: Metric
    halves: bool
    """Something of the vectors will be stored in float16."""

    def __call__(self) -> Callable[[Span], list[Assigned]]:
        """Open the embeddings and the centroids."""
        _check_shared(self.partial)
        block = self.open()

        def work(span: Span) -> list[Assigned]:
            with contextlib.closing(_blocks(self.embeddings, ASSIGN_ROWS, span)) as blocks:
                return [block(first, vectors, span.known) for first, vectors in blocks]

        return work

    def open(self) -> Callable[[int, FloatArray, FloatArray], Assigned]:
        """What assigns a block, from its first row, its vectors and `Nearest.least`.

        Raises (when called):
            InputError: a vector cannot be used.
        """
        nearest_lists = Assigner(np.load(IndexPaths(self.partial).centroids), self.metric)
        truth = held_out(self.partial, self.metric)

        def assign(first: int, block: FloatArray, least: FloatArray) -> Assigned:
            if self.halves and np.abs(block).max() > MAX_FLOAT16:
                row = first + int(np.abs(block).max(axis=1).argmax())
                raise InputError(
                    f"The vector in row {row:,} holds {np.abs(block).max():g}, and float16 ends at {MAX_FLOAT16:g}.",
                    remedy="Choose another type than float16 for --storage and --keep-vectors.",
                )
            lists = nearest_lists(block)
            if (lists < 0).any():
                row = int(np.flatnonzero(lists < 0)[0])
                length = np.linalg.norm(block[row].astype(np.float64))
                raise InputError(
                    f"The vector in row {first + row:,} is {length:.3g} long, and its distance to any list "
                    "exceeds float32.",
                    remedy="Scale the vectors down.",
                )
            return Assigned(first, lists.astype(np.int32), truth.found(first, block, least))

        return assign


@dataclass(frozen=True)
class Placing:
    """Writes rows' codes and numbers where the sizes of the lists say; rows of a list keep their order."""

    embeddings: Embeddings
    partial: Path
    metric: Metric
    storage: Storage
    keep_vectors: str
    block_rows: int

    def __call__(self) -> Callable[[Span], int]:
        """Open the embeddings, the assignments and the files to write."""
        _check_shared(self.partial)
        placer = self.open()  # until the process ends

        def work(span: Span) -> int:
            filled = span.known.astype(np.int64)
            with contextlib.closing(_blocks(self.embeddings, self.block_rows, span)) as blocks:
                for first, block in blocks:
                    placer.place(first, block, filled)
            placer.sync()
            return span.end

        return work

    def open(self) -> Placer:
        """What places blocks, in files that are there in their full size (`prepare`); to be closed."""
        return Placer(self)

    def prepare(self, table: TableArray, lists_bytes: int) -> None:
        """Give the files their sizes; what is in them stays."""
        paths = IndexPaths(self.partial)
        if not paths.offsets.exists():
            save_array(paths.offsets, table)
        with sized(paths.lists, lists_bytes):
            pass
        header, vector_bytes = self.vectors_layout
        if header:
            with sized(paths.vectors, len(header) + self.embeddings.rows * vector_bytes) as vectors:
                write_at(vectors, memoryview(header), 0)

    @property
    def vectors_layout(self) -> tuple[bytes, int]:
        """`lay_out_vectors`."""
        return lay_out_vectors(self.embeddings.rows, self.embeddings.dimension, self.keep_vectors)


class Placer:
    """Has the files of a `Placing` open."""

    def __init__(self, what: Placing) -> None:
        paths = IndexPaths(what.partial)
        table: TableArray = np.load(paths.offsets)
        ranges = np.load(paths.quantizer) if what.storage is Storage.INT8 else None
        self._encode = encoder(np.load(paths.centroids), what.metric, what.storage, ranges)
        self._lists = np.memmap(assignments_path(what.partial), np.int32, "r", shape=(what.embeddings.rows,))
        self._offset, self._capacity = table[:, 2].astype(np.int64), table[:, 1].astype(np.int64)
        self._keep = what.keep_vectors
        header, self._vector_bytes = what.vectors_layout
        self._header_bytes = len(header)
        self._descriptor = os.open(paths.lists, os.O_RDWR)
        self._vectors = os.open(paths.vectors, os.O_RDWR) if header else None

    def close(self) -> None:
        """Close the files."""
        os.close(self._descriptor)
        if self._vectors is not None:
            os.close(self._vectors)

    def place(self, first: int, block: FloatArray, filled: IntArray) -> None:
        """Write a block; ``filled``, vectors in each list before it, (nlist,), counts them afterwards."""
        if self._vectors is not None:
            # Before there are codes, so that this copy takes no memory beside theirs.
            kept = block.astype(self._keep, copy=False)
            write_at(self._vectors, kept.data.cast("B"), self._header_bytes + first * self._vector_bytes)
            del kept
        chosen = self._lists[first : first + len(block)]
        order = np.argsort(chosen, kind="stable")
        codes, rows = self._encode(block)[order], first + order
        size = codes.shape[1]
        present, begin, count = np.unique(chosen[order], return_index=True, return_counts=True)
        code_places = self._offset[present] + filled[present] * size
        row_places = self._offset[present] + self._capacity[present] * size + filled[present] * ID_BYTES
        code_bytes, row_bytes = codes.data.cast("B"), rows.view(np.uint8).data.cast("B")
        for low, high, code_place, row_place in zip(
            begin.tolist(), (begin + count).tolist(), code_places.tolist(), row_places.tolist(), strict=True
        ):
            write_at(self._descriptor, code_bytes[low * size : high * size], code_place)
            write_at(self._descriptor, row_bytes[low * ID_BYTES : high * ID_BYTES], row_place)
        filled[present] += count

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        os.fdatasync(self._descriptor)
        if self._vectors is not None:
            os.fdatasync(self._vectors)


def _check_shared(partial: Path) -> None:
    if not IndexPaths(partial).centroids.exists():
        raise ResourceError(
            f"A worker does not see {partial} with what is in it.",
            remedy="Choose an --output on a file system that all machines share.",
        )


def assignments_path(partial: Path) -> Path:
    """The list of each row, while an index is built: int32, one after another."""
    return partial / "work" / "assignments.i32"


def held_out(partial: Path, metric: Metric) -> Nearest:
    """The queries that recall is measured with, with no answers yet."""
    with np.load(partial / "work" / "queries.npz") as saved:
        return Nearest(saved["vectors"], saved["rows"], metric)


def encoder(centroids: FloatArray, metric: Metric, storage: Storage, trained: FloatArray | None) -> Encode:
    """What makes codes of vectors: (n, dimension) float32 to (n, code_size) uint8.

    Args:
        centroids: of the index, (nlist, dimension).
        metric: of the index.
        storage: how vectors are kept.
        trained: `train_ranges`, for ``int8``.
    """
    if storage is Storage.FLOAT32:
        return lambda block: block.view(np.uint8)
    # The quantizer inside the very index that will scan these codes.
    ivf = empty_ivf(flat(centroids, metric), centroids.shape[1], len(centroids), metric, storage, trained)
    encode: Encode = lambda block: ivf.sq.compute_codes(block)  # noqa: E731
    return encode
