"""Building an index out of core, in stages that each resume: train, assign with passages beside it, place, seal.

Everything happens in ``INDEX.partial/``, whose ``work/`` holds what is needed only until the end. A stage's files
appear whole, or grow in a way that a checkpoint can cut back:

=========  ==========================================================  =============================================
stage      what it leaves                                              after a kill
=========  ==========================================================  =============================================
train      work/queries.npz, quantizer.npy, centroids.npy (last)       starts again, from the same sample
assign     work/assignments.i32, work/assigned.npz (rows done, truth)  goes on from the last checkpoint
passages   passages.arrow                                              starts again
place      offsets.npy, lists.bin, vectors.npy if they are kept,       goes on; a row's place is arithmetic
           work/placed.json (rows done)
seal       checksums.npy, manifest.json (last)                         starts again
=========  ==========================================================  =============================================

Assigning is arithmetic and writing passages is the disk's work, so they run at once. Then ``work/`` goes and the folder
is renamed. Equal input and options give equal bytes, killed or not.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from telerag_cli import __version__
from telerag_cli.arrays import BoolArray, FloatArray, IntArray, TableArray
from telerag_cli.config import Metric, Storage, format_bytes
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.errors import UsageError
from telerag_cli.files import read_json, wrap_os_error, write_json, writing
from telerag_cli.index.artifact import (
    ID_BYTES,
    EmbedderInfo,
    Index,
    IndexPaths,
    Manifest,
    code_size,
    lay_out,
    lay_out_vectors,
)
from telerag_cli.index.partial import (
    Making,
    check_disk,
    claimed,
    finished,
    free_bytes,
    left_bytes,
    partial_of,
    publish,
    save_array,
    seal,
)
from telerag_cli.index.passages import write_passages
from telerag_cli.index.recall import ListRecall, Nearest
from telerag_cli.index.scoring import Coarse
from telerag_cli.index.stages import (
    ASSIGN_ROWS,
    Assigned,
    Assigning,
    Encode,
    Placing,
    Pool,
    Span,
    assignments_path,
    encoder,
    held_out,
    span_rows,
)
from telerag_cli.index.train import TrainingPlan, draw_rows, plan_training, train_centroids, train_ranges
from telerag_cli.index.verify import scan_lists
from telerag_cli.progress import Progress, silent

__all__ = ["BuildOptions", "BuildPlan", "Encode", "Pool", "build", "encoder", "finished", "partial_of", "plan_build"]

CHECKPOINT_BLOCKS = 16
"""Assigned blocks between checkpoints: some seconds of work to lose, against a wait for the disk each."""
LARGEST_PLACE_BYTES = 512 << 20


@dataclass(frozen=True)
class BuildOptions:
    """What the user chooses."""

    nlist: int | None = None
    """None: `telerag_cli.index.train.auto_nlist`."""
    metric: Metric = Metric.IP
    storage: Storage = Storage.FLOAT32
    seed: int = 0
    memory_bytes: int = 2 << 30
    """For the training sample and blocks of vectors; the libraries themselves take some 200 MB beside it."""
    gpu: int | None = None
    """The GPU that k-means runs on, from `telerag_cli.index.train.find_gpu`; None: the CPU."""
    keep_vectors: str = ""
    """``float16`` or ``float32``: keep the vectors in row order too, in this type; empty: do not."""

    @property
    def trained_on(self) -> str:
        """``cpu`` or ``cuda``, for the manifest."""
        return "cpu" if self.gpu is None else "cuda"


@dataclass(frozen=True)
class BuildPlan(Making):
    """What will be built, and the bytes it takes where."""

    training: TrainingPlan
    rows: int
    dimension: int
    code_size: int
    place_rows: int
    sample_bytes: int
    block_bytes: int
    lists_bytes: int
    passages_bytes: int
    vectors_bytes: int
    """Of ``vectors.npy``, its header included; 0 if no vectors are kept."""
    work_bytes: int
    on_disk_bytes: int
    """What a killed build has left, and this one will use."""
    free_disk_bytes: int

    @property
    def needed_disk_bytes(self) -> int:
        """What is still to be written."""
        all_bytes = self.lists_bytes + self.passages_bytes + self.vectors_bytes + self.work_bytes
        return max(0, all_bytes - self.on_disk_bytes)

    @staticmethod
    def parameters_of(manifest: Manifest) -> dict[str, Any]:
        """`parameters` of a finished index."""
        return {
            "embeddings": manifest.source,
            "rows": manifest.ntotal,
            "dimension": manifest.dimension,
            "metric": str(manifest.metric),
            "storage": str(manifest.storage),
            "nlist": manifest.nlist,
            "seed": manifest.seed,
            "training rows": manifest.training_rows,
            "training device": manifest.trained_on,
            "kept vectors": manifest.kept_vectors or "none",
            "telerag": manifest.created_by.removeprefix("telerag "),
        }


def plan_build(embeddings: Embeddings, root: Path, options: BuildOptions) -> BuildPlan:
    """Work out sizes, and refuse what memory or disk cannot hold.

    Args:
        embeddings: what to index.
        root: the index folder to make.
        options: what the user chose.

    Raises:
        UsageError: ``nlist`` or ``memory_bytes`` do not fit the data, or ``keep_vectors`` the storage.
        ResourceError: the disk has not enough room.
    """
    if options.keep_vectors and options.storage is Storage.FLOAT32:
        raise UsageError(
            f"--keep-vectors {options.keep_vectors} was asked for with --storage float32, whose lists hold the "
            "vectors themselves.",
            remedy="Leave --keep-vectors out, or choose --storage float16 or int8.",
        )
    dimension, rows = embeddings.dimension, embeddings.rows
    code_bytes = code_size(dimension, options.storage)
    # A block to assign, with its scores against a few hundred queries; at its end Parquet's own buffers.
    block_bytes = ASSIGN_ROWS * (8 * dimension + 2048) + (32 << 20)
    sample_bytes = (
        options.memory_bytes - block_bytes
    ) // 2  # k-means and SQ8 look at the sample through copies of parts
    if sample_bytes < 4 * dimension:
        raise UsageError(
            f"--memory is {format_bytes(options.memory_bytes)}, and blocks of {dimension} dimensions need "
            f"{format_bytes(block_bytes)}.",
            remedy="Raise --memory.",
        )
    training = plan_training(rows, dimension, options.nlist, sample_bytes)
    per_row = 4 * dimension + 2 * code_bytes + 2 * ID_BYTES
    place_bytes = min((options.memory_bytes - (32 << 20)) // 2, LARGEST_PLACE_BYTES)
    place_rows = max(1, min(rows, place_bytes // per_row))
    _, even = lay_out(np.full(training.nlist, -(-rows // training.nlist), np.int64), code_bytes)
    header, vector_bytes = lay_out_vectors(rows, dimension, options.keep_vectors)
    parameters = {
        "embeddings": embeddings.fingerprint(),
        "rows": rows,
        "dimension": dimension,
        "metric": str(options.metric),
        "storage": str(options.storage),
        "nlist": training.nlist,
        "seed": options.seed,
        "training rows": training.training_rows,
        "training device": options.trained_on,
        "kept vectors": options.keep_vectors or "none",
        "telerag": __version__,
    }
    return BuildPlan(
        root,
        parameters,
        training,
        rows,
        dimension,
        code_bytes,
        place_rows,
        sample_bytes=training.training_rows * 4 * dimension,
        block_bytes=max(block_bytes, place_rows * per_row),
        lists_bytes=even,
        passages_bytes=embeddings.passage_bytes(),
        vectors_bytes=len(header) + rows * vector_bytes,
        work_bytes=4 * rows + training.nlist * (4 * dimension + 64) + (1 << 20),
        on_disk_bytes=left_bytes(root),
        free_disk_bytes=free_bytes(root),
    )


def build(
    embeddings: Embeddings,
    root: Path,
    options: BuildOptions,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    plan: BuildPlan | None = None,
    pool: Pool | None = None,
) -> Index:
    """Build an index, or go on with one that was interrupted; a finished one of the same parameters is opened as it is.

    Args:
        embeddings: what to index.
        root: the index folder to make.
        options: what the user chose.
        overwrite: replace a finished index, and start over if an interrupted build had other parameters.
        progress: shows the stages.
        plan: `plan_build` of the same, if the caller has it.
        pool: processes that assign and place; they find the embeddings and ``root`` by the same paths. None: this one
            does.

    Raises:
        ArtifactError: ``root`` is something else, or was begun or built with other parameters.
        ResourceError: the disk is full or cannot be written; what was finished is kept.
        InputError: a vector cannot be used.
    """
    plan = plan or plan_build(embeddings, root, options)
    if finished(plan) and not overwrite:
        return Index.open(root)
    check_disk(
        root, plan.needed_disk_bytes, "Free space, choose another output, or store less with --storage float16 or int8."
    )
    try:
        with claimed(plan, overwrite):
            _Build(embeddings, plan, options, progress, pool).run()
            publish(plan)
    except OSError as error:
        raise wrap_os_error(error, plan.partial) from error
    return Index.open(root)


class _Build:
    """The stages; each looks at what is there and does what is missing."""

    def __init__(
        self, embeddings: Embeddings, plan: BuildPlan, options: BuildOptions, progress: Progress, pool: Pool | None
    ) -> None:
        self.embeddings, self.plan, self.options, self.progress = embeddings, plan, options, progress
        self.pool = pool
        self.paths = IndexPaths(plan.partial)
        self.work = plan.partial / "work"
        self.assignments_path = assignments_path(plan.partial)

    def run(self) -> None:
        if self.paths.manifest.exists():
            return
        if not self.paths.centroids.exists():
            self.train()
        with self._passages_beside():
            self.assign()
        self.place()
        self.seal()

    @cached_property
    def centroids(self) -> FloatArray:
        """(nlist, dimension)."""
        centroids: FloatArray = np.load(self.paths.centroids)
        return centroids

    @cached_property
    def ranges(self) -> FloatArray | None:
        """Of ``int8``."""
        return np.load(self.paths.quantizer) if self.options.storage is Storage.INT8 else None

    def train(self) -> None:
        plan, options = self.plan, self.options
        training, held_out = draw_rows(plan.rows, plan.training, options.seed)
        drawn = np.union1d(training, held_out)
        with self.progress("Sampling vectors", plan.rows, unit="vectors") as advance:
            vectors = self.embeddings.sample(drawn, advance)
        is_query = np.isin(drawn, held_out)
        with writing(self.work / "queries.npz") as temporary, temporary.open("wb") as handle:
            np.savez(handle, rows=held_out, vectors=vectors[is_query])
        sample = _drop(vectors, is_query)
        with self.progress(f"Training {plan.training.nlist:,} lists on {len(sample):,} vectors", None):
            if options.storage is Storage.INT8:
                save_array(self.paths.quantizer, train_ranges(sample))
            centroids = train_centroids(sample, plan.training.nlist, options.metric, options.seed, options.gpu)
        save_array(self.paths.centroids, centroids)

    def assign(self) -> None:
        """The nearest list of every row; and, while the vectors pass by, the exact answers to the held-out queries."""
        state = self.work / "assigned.npz"
        truth = held_out(self.plan.partial, self.options.metric)
        done = 0
        if state.exists():
            with np.load(state) as saved:
                done, truth.scores, truth.rows = int(saved["done"]), saved["scores"], saved["rows"]
        if done == self.plan.rows:
            return
        halves = self.options.storage is Storage.FLOAT16 or self.options.keep_vectors == "float16"
        assigning = Assigning(self.embeddings, self.plan.partial, self.options.metric, halves)
        with (
            self.progress("Assigning to lists", self.plan.rows, unit="vectors") as advance,
            self.assignments_path.open("ab") as handle,
            contextlib.closing(self._assigned(assigning, done, truth)) as blocks,
        ):
            handle.truncate(4 * done)
            advance(done)
            for number, block in enumerate(blocks, 1):
                handle.write(block.lists.tobytes())
                truth.merge(block.found)
                done = block.first + len(block.lists)
                if number % CHECKPOINT_BLOCKS == 0 or done == self.plan.rows:
                    handle.flush()
                    os.fsync(handle.fileno())
                    with writing(state) as temporary, temporary.open("wb") as saved_to:
                        np.savez(saved_to, done=done, scores=truth.scores, rows=truth.rows)
                advance(len(block.lists))

    def _assigned(self, assigning: Assigning, done: int, truth: Nearest) -> Generator[Assigned]:
        """The blocks from row ``done`` on, in order; ``truth`` grows meanwhile."""
        if self.pool is None:
            assign = assigning.open()
            for first, vectors in self.embeddings.batches(ASSIGN_ROWS, done):
                yield assign(first, vectors, truth.least)
            return
        step = span_rows(self.embeddings, ASSIGN_ROWS)
        # What is known is so when the span is sent: it may be of fewer rows than those before it, and lets more pass.
        spans = (
            Span(first, min(first + step, self.plan.rows), truth.least) for first in range(done, self.plan.rows, step)
        )
        with contextlib.closing(self.pool(spans, assigning)) as results:
            for blocks in results:
                yield from blocks

    def place(self) -> None:
        """Write each row's code and number where the sizes of the lists say; rows of a list keep their order."""
        plan = self.plan
        lists = np.memmap(self.assignments_path, np.int32, "r", shape=(plan.rows,))
        sizes = _count(lists, plan.training.nlist, 0, plan.rows)
        table, total_bytes = lay_out(sizes, plan.code_size)
        state = self.work / "placed.json"
        done = int(read_json(state)["rows"]) if state.exists() else 0
        if done == plan.rows:
            return
        filled = _count(lists, plan.training.nlist, 0, done)
        rows = plan.place_rows if self.pool is None else max(1, plan.place_rows // self.pool.workers)
        placing = Placing(
            self.embeddings, plan.partial, self.options.metric, self.options.storage, self.options.keep_vectors, rows
        )
        placing.prepare(table, total_bytes)
        with (
            self.progress("Placing in lists", plan.rows, unit="vectors") as advance,
            contextlib.closing(self._placed(placing, lists, filled, done)) as ends,
        ):
            advance(done)
            for end in ends:
                write_json(state, {"rows": end})
                advance(end - done)
                done = end
        assert (filled == sizes).all()

    def _placed(self, placing: Placing, lists: npt.NDArray[np.int32], filled: IntArray, done: int) -> Generator[int]:
        """Place what is not, and say after each part how many rows are, on the disk; ``filled`` counts them."""
        plan, rows = self.plan, placing.block_rows
        if self.pool is not None:
            step = span_rows(self.embeddings, rows)

            def spans(start: int) -> Iterator[Span]:
                for first in range(start, plan.rows, step):
                    end = min(first + step, plan.rows)
                    yield Span(first, end, filled.copy())
                    filled[:] += _count(lists, plan.training.nlist, first, end)

            with contextlib.closing(self.pool(spans(done), placing)) as ends:
                yield from ends
            return
        synced: Future[None] | None = None
        end = done
        with contextlib.closing(placing.open()) as placer, ThreadPoolExecutor(1) as disk:
            for first, block in self.embeddings.batches(rows, done):
                placer.place(first, block, filled)
                # What was written is on disk before it is counted as done; meanwhile the next block is placed.
                if synced is not None:
                    synced.result()
                    yield end
                end = first + len(block)
                synced = disk.submit(placer.sync)
            if synced is not None:
                synced.result()
                yield end

    @contextlib.contextmanager
    def _passages_beside(self) -> Iterator[None]:
        """Write the passages on a thread while the block runs, then wait for what is left of it."""
        if self.paths.passages.exists():
            yield
            return
        written = 0
        unwanted = threading.Event()

        def work() -> None:
            nonlocal written
            with writing(self.paths.passages) as temporary:
                for count in write_passages(self.embeddings.passages(), temporary):
                    written += count
                    if unwanted.is_set():
                        raise InterruptedError  # so that no half of it gets the name

        with ThreadPoolExecutor(1) as beside:
            future = beside.submit(work)
            try:
                yield
                with self.progress("Writing passages", self.plan.rows, unit="passages") as advance:
                    shown = 0
                    ended = False
                    while not ended:
                        ended = bool(wait([future], timeout=0.2).done)
                        advance(written - shown)
                        shown = written
            except BaseException:
                unwanted.set()
                raise
            future.result()

    def seal(self) -> None:
        """Sum every byte, search the lists while they pass by, and write the manifest."""
        plan, options, paths = self.plan, self.options, self.paths
        table: TableArray = np.load(paths.offsets)
        truth = held_out(plan.partial, options.metric)
        with np.load(self.work / "assigned.npz") as saved:
            truth.scores, truth.rows = saved["scores"], saved["rows"]
        recall = ListRecall(
            truth,
            Coarse(self.centroids, options.metric),
            paths.lists,
            table,
            plan.code_size,
            options.storage,
            self.ranges,
        )
        with self.progress("Checking lists", paths.lists.stat().st_size, unit="bytes") as advance, recall:
            sums, whole = scan_lists(paths.lists, table, plan.code_size, advance, recall.on_codes)
        told = self.embeddings.description
        about = Manifest(
            dimension=plan.dimension,
            metric=options.metric,
            storage=options.storage,
            nlist=plan.training.nlist,
            ntotal=plan.rows,
            code_size=plan.code_size,
            seed=options.seed,
            embedder=EmbedderInfo(told.get("model"), told.get("pooling"), told.get("normalized"), told.get("prompt")),
            files={},
            recall_at_10=recall.result(),
            recall_queries=plan.training.queries,
            training_rows=plan.training.training_rows,
            trained_on=options.trained_on,
            kept_vectors=options.keep_vectors,
            source=plan.parameters["embeddings"],
            created_by=f"telerag {__version__}",
        )
        seal(paths, about, sums, whole, self.progress)


def _count(lists: npt.NDArray[np.int32], nlist: int, start: int, stop: int) -> IntArray:
    counts = np.zeros(nlist, np.int64)
    for low in range(start, stop, 1 << 20):
        counts += np.bincount(lists[low : min(low + (1 << 20), stop)], minlength=nlist)
    return counts


def _drop(vectors: FloatArray, out: BoolArray) -> FloatArray:
    """The vectors not marked, moved together in place: a copy of the sample would double the memory."""
    kept = np.flatnonzero(~out)
    for low in range(0, len(kept), ASSIGN_ROWS):
        vectors[low : low + ASSIGN_ROWS][: len(kept) - low] = vectors[kept[low : low + ASSIGN_ROWS]]
    return vectors[: len(kept)]
