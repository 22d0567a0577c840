"""Building an index out of core, in stages that each resume: train, assign with passages beside it, place, seal.

=========  ==========================================================  =============================================
stage      what it leaves in ``INDEX.partial/``                        after a kill
=========  ==========================================================  =============================================
train      work/queries.npz, quantizer.npy, centroids.npy (last)       starts again, from the same sample
assign     work/assignments.i32, work/assigned.npz (rows done, truth)  goes on from the last checkpoint
passages   passages.arrow                                              starts again
place      offsets.npy, lists.bin, vectors.npy if they are kept,       goes on; a row's place is arithmetic
           work/placed.json (rows done)
seal       checksums.npy, manifest.json (last)                         starts again
=========  ==========================================================  =============================================

Assigning is arithmetic and writing passages is the disk's work, so they run at once. Equal input and options give equal
bytes, killed or not.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from telerag_cli import __version__
from telerag_cli.arrays import FloatArray, IntArray, TableArray
from telerag_cli.build_config import BuildConfig
from telerag_cli.config import KeptType, Metric, Storage
from telerag_cli.corpus.embeddings import Embeddings, check_shards
from telerag_cli.errors import UsageError
from telerag_cli.files import read_json, replacing, write_json
from telerag_cli.index.artifact import ID_BYTES, EmbedderInfo, Index, Manifest, code_size, lay_out, lay_out_vectors
from telerag_cli.index.partial import Draft, save_array, save_arrays, seal
from telerag_cli.index.passages import write_passages
from telerag_cli.index.recall import ListRecall, Nearest
from telerag_cli.index.scoring import Coarse
from telerag_cli.index.stages import (
    ASSIGN_ROWS,
    Assigning,
    Placing,
    assignments_path,
    held_out,
    read_assignments,
    run_stage,
)
from telerag_cli.index.train import TrainingPlan, draw_rows, find_gpu, plan_training, train_centroids, train_ranges
from telerag_cli.index.verify import scan_lists
from telerag_cli.progress import Progress, WorkerPool, silent
from telerag_cli.units import format_bytes

CHECKPOINT_BLOCKS = 16
"""Assigned blocks between checkpoints: some seconds of work to lose, against a wait for the disk each."""
NORMS_ROWS = 1024
MAX_PLACE_BYTES = 512 << 20
REMEDY = "Free space, choose another output, or store less with --storage float16 or int8."


@dataclass(frozen=True)
class BuildPlan(Draft):
    """What will be built, and the bytes it takes where."""

    embeddings: Embeddings
    config: BuildConfig
    gpu: int | None
    """Number of the GPU that k-means runs on; None: the CPU."""
    training: TrainingPlan
    place_rows: int
    """Rows placed at a time."""
    block_bytes: int
    lists_bytes: int
    passages_bytes: int
    vectors_bytes: int
    """Bytes of ``vectors.npy``, its header included; 0 if no vectors are kept."""
    work_bytes: int

    @property
    def sample_bytes(self) -> int:
        """Bytes of the training sample."""
        return self.training.training_rows * 4 * self.embeddings.dimension

    @property
    def code_size(self) -> int:
        """Bytes of one stored vector."""
        return code_size(self.embeddings.dimension, self.config.storage)

    @property
    def kept(self) -> str:
        """Type of the kept vectors; empty if none are."""
        return str(self.config.keep_vectors or "")

    @property
    def trained_on(self) -> str:
        """``cpu`` or ``cuda``: where k-means runs, which rounds otherwise on each."""
        return "cpu" if self.gpu is None else "cuda"


def norms_note(embeddings: Embeddings, metric: Metric) -> str | None:
    """Return a sentence if the first vectors differ in length where the inner product is the score, else None."""
    _first, block = next(embeddings.batches(NORMS_ROWS))
    norms = np.linalg.norm(block, axis=1)
    if metric is not Metric.IP or norms.max() <= 1.01 * norms.min():
        return None
    return (
        f"The vectors are not normalized (lengths from {norms.min():.3g} to {norms.max():.3g}), "
        "and by inner product long ones win; if cosine is meant, normalize them, or use --metric l2."
    )


def plan_build(embeddings: Embeddings | Path | str, output: Path | str, config: BuildConfig) -> BuildPlan:
    """Work out sizes, and refuse what memory cannot hold; arguments as of `build_index`.

    Raises:
        UsageError: ``nlist``, ``memory_bytes`` or ``device`` do not fit the data or the machine.
        ResourceError: the GPU asked for is not there.
    """
    if not isinstance(embeddings, Embeddings):
        embeddings = Embeddings.open(Path(embeddings), config.column)
    gpu = find_gpu(config.device)
    dimension, rows = embeddings.dimension, embeddings.rows
    code_bytes = code_size(dimension, config.storage)
    # A block to assign, with its scores against a few hundred queries; at its end Parquet's own buffers.
    assign_bytes = ASSIGN_ROWS * (8 * dimension + 2048) + (32 << 20)
    # k-means and SQ8 look at the sample through copies of parts.
    sample_bytes = (config.memory_bytes - assign_bytes) // 2
    if sample_bytes < 4 * dimension:
        raise UsageError(
            f"--memory is {format_bytes(config.memory_bytes)}, and blocks of {dimension} dimensions need "
            f"{format_bytes(assign_bytes)}.",
            remedy="Raise --memory.",
        )
    training = plan_training(rows, dimension, config.nlist, sample_bytes)
    per_row = 4 * dimension + 2 * code_bytes + 2 * ID_BYTES
    place_bytes = min((config.memory_bytes - (32 << 20)) // 2, MAX_PLACE_BYTES)
    place_rows = max(1, min(rows, place_bytes // per_row))
    _, lists_bytes = lay_out(np.full(training.nlist, -(-rows // training.nlist), np.int64), code_bytes)
    header, vector_bytes = lay_out_vectors(rows, dimension, str(config.keep_vectors or ""))
    passages_bytes, vectors_bytes = embeddings.passage_bytes(), len(header) + rows * vector_bytes
    work_bytes = 4 * rows + 8 * rows * bool(vectors_bytes) + training.nlist * (4 * dimension + 64) + (1 << 20)
    parameters = {
        "embeddings": embeddings.fingerprint(),
        "rows": rows,
        "dimension": dimension,
        "metric": config.metric,
        "storage": config.storage,
        "nlist": training.nlist,
        "seed": config.seed,
        "training rows": training.training_rows,
        "training device": "cpu" if gpu is None else "cuda",
        "kept vectors": str(config.keep_vectors or ""),
        "version": f"telerag {__version__}",
    }
    return BuildPlan(
        Path(output),
        parameters,
        needed_bytes=lists_bytes + passages_bytes + vectors_bytes + work_bytes,
        embeddings=embeddings,
        config=config,
        gpu=gpu,
        training=training,
        place_rows=place_rows,
        block_bytes=max(assign_bytes, place_rows * per_row),
        lists_bytes=lists_bytes,
        passages_bytes=passages_bytes,
        vectors_bytes=vectors_bytes,
        work_bytes=work_bytes,
    )


def build_index(
    embeddings: Embeddings | Path | str,
    output: Path | str,
    config: BuildConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    pool: WorkerPool | None = None,
    plan: BuildPlan | None = None,
) -> Index:
    """Build an index, or go on with one that was interrupted; a finished one of the same parameters is opened as it is.

    ``embeddings`` is a folder made by `telerag_cli.embed`, or Parquet with a column of vectors. ``overwrite`` replaces
    a finished index, and starts over if an interrupted build had other parameters. The processes of ``pool`` find the
    embeddings and ``output`` by the same paths. ``plan`` is `plan_build` of the same, if the caller has it.

    Raises:
        UsageError: the options contradict each other or the data.
        ArtifactError: ``output`` is something else, or was begun or built with other parameters.
        ResourceError: memory or disk do not suffice; what was finished is kept.
        InputError: a vector cannot be used.
    """
    plan = plan or plan_build(embeddings, output, config or BuildConfig())
    if not plan.finished(overwrite=overwrite):
        with plan.claimed(overwrite=overwrite, remedy=REMEDY):
            if not plan.paths.manifest.exists():
                build = _Build(plan, progress, pool)
                build.check()
                build.train()
                with build.passages_beside():
                    build.assign()
                build.place()
                build.seal()
    return Index.open(plan.root)


class _Build:
    """The stages; each looks at what is there and does what is missing."""

    def __init__(self, plan: BuildPlan, progress: Progress, pool: WorkerPool | None) -> None:
        self.plan, self.progress, self.pool = plan, progress, pool
        self.embeddings, self.config, self.paths = plan.embeddings, plan.config, plan.paths
        self.rows = plan.embeddings.rows

    def check(self) -> None:
        """Compare the embeddings with their checksums; files of another make have none."""
        if self.embeddings.description:
            with self.progress("Checking embeddings", self.embeddings.bytes, unit="bytes") as advance:
                check_shards(self.embeddings, advance)

    def train(self) -> None:
        if self.paths.centroids.exists():
            return
        config, nlist = self.config, self.plan.training.nlist
        training, queries = draw_rows(self.rows, self.plan.training, config.seed)
        drawn = np.union1d(training, queries)
        with self.progress("Sampling vectors", self.rows, unit="vectors") as advance:
            vectors = self.embeddings.sample(drawn, advance)
        is_query = np.isin(drawn, queries)
        save_arrays(self.plan.work / "queries.npz", rows=queries, vectors=vectors[is_query])
        sample = _drop(vectors, is_query)
        with self.progress(f"Training {nlist:,} lists on {len(sample):,} vectors", None):
            if config.storage is Storage.INT8:
                save_array(self.paths.quantizer, train_ranges(sample))
            centroids = train_centroids(sample, nlist, config.metric, config.seed, self.plan.gpu)
        save_array(self.paths.centroids, centroids)

    def truth(self) -> tuple[Nearest, int]:
        """The exact answers to the held-out queries among the rows assigned so far, and the number of these rows."""
        truth, done = held_out(self.plan.partial, self.config.metric), 0
        state = self.plan.work / "assigned.npz"
        if state.exists():
            with np.load(state) as saved:
                done, truth.scores, truth.rows = int(saved["done"]), saved["scores"], saved["rows"]
        return truth, done

    def assign(self) -> None:
        """Find the nearest list of every row; and, while the vectors pass by, the answers to the held-out queries."""
        truth, done = self.truth()
        if done == self.rows:
            return
        halves = self.config.storage is Storage.FLOAT16 or self.config.keep_vectors is KeptType.FLOAT16
        stage = Assigning(self.embeddings, self.plan.partial, ASSIGN_ROWS, self.config.metric, halves)
        # What is known is so when a span is sent: it may be of fewer rows than those before it, and lets more pass.
        blocks = run_stage(stage, done, lambda _first, _end: truth.least, self.pool)
        with (
            self.progress("Assigning to lists", self.rows, unit="vectors") as advance,
            assignments_path(self.plan.partial).open("ab") as handle,
            contextlib.closing(blocks),
        ):
            handle.truncate(4 * done)
            advance(done)
            for number, (lists, found) in enumerate(blocks, 1):
                handle.write(lists.tobytes())
                truth.merge(found)
                done += len(lists)
                if number % CHECKPOINT_BLOCKS == 0 or done == self.rows:
                    handle.flush()
                    os.fsync(handle.fileno())
                    save_arrays(self.plan.work / "assigned.npz", done=done, scores=truth.scores, rows=truth.rows)
                advance(len(lists))

    def place(self) -> None:
        """Write each row's code and number where the sizes of the lists say; rows of a list keep their order."""
        plan, state = self.plan, self.plan.work / "placed.json"
        done = int(read_json(state)["rows"]) if state.exists() else 0
        if done == self.rows:
            return
        lists, nlist = read_assignments(plan.partial), plan.training.nlist
        filled = _count(lists, nlist, 0, done)

        def before(first: int, end: int) -> IntArray:
            known = filled.copy()
            filled[:] += _count(lists, nlist, first, end)
            return known

        rows = max(1, plan.place_rows // (self.pool.workers if self.pool else 1))
        stage = Placing(self.embeddings, plan.partial, rows, self.config.storage, plan.kept)
        stage.prepare(*lay_out(_count(lists, nlist, 0, self.rows), plan.code_size))
        ends = run_stage(stage, done, before, self.pool)
        with self.progress("Placing in lists", self.rows, unit="vectors") as advance, contextlib.closing(ends):
            advance(done)
            for end in ends:
                write_json(state, {"rows": end})
                advance(end - done)
                done = end

    @contextlib.contextmanager
    def passages_beside(self) -> Iterator[None]:
        """Write the passages on a thread while the block runs, then wait for what is left of it."""
        if self.paths.passages.exists():
            yield
            return
        written = 0
        unwanted = threading.Event()

        def work() -> None:
            nonlocal written
            with replacing(self.paths.passages) as temporary:
                for count in write_passages(self.embeddings.passages(), temporary):
                    written += count
                    if unwanted.is_set():
                        raise InterruptedError  # so that no half of it gets the name

        with ThreadPoolExecutor(1) as beside:
            future = beside.submit(work)
            try:
                yield
                with self.progress("Writing passages", self.rows, unit="passages") as advance:
                    shown, ended = 0, False
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
        plan, config, paths = self.plan, self.config, self.paths
        table: TableArray = np.load(paths.offsets)
        ranges = np.load(paths.quantizer) if config.storage is Storage.INT8 else None
        coarse = Coarse(np.load(paths.centroids), config.metric)
        recall = ListRecall(self.truth()[0], coarse, paths.lists, table, config.storage, ranges)
        with self.progress("Checking lists", paths.lists.stat().st_size, unit="bytes") as advance, recall:
            sums, whole = scan_lists(paths.lists, table, plan.code_size, advance, recall.on_codes)
        told = self.embeddings.description
        manifest = Manifest(
            dimension=self.embeddings.dimension,
            metric=config.metric,
            storage=config.storage,
            nlist=plan.training.nlist,
            ntotal=self.rows,
            code_size=plan.code_size,
            seed=config.seed,
            embedder=EmbedderInfo(told.get("model"), told.get("pooling"), told.get("normalized"), told.get("prompt")),
            files={},
            recall_at_10=recall.result(),
            recall_queries=plan.training.queries,
            training_rows=plan.training.training_rows,
            trained_on=plan.trained_on,
            kept_vectors=plan.kept,
            source=plan.parameters["embeddings"],
            created_by=f"telerag {__version__}",
        )
        seal(paths, manifest, sums, whole, self.progress)


def _count(lists: npt.NDArray[np.int32], nlist: int, start: int, stop: int) -> IntArray:
    counts = np.zeros(nlist, np.int64)
    for low in range(start, stop, 1 << 20):
        counts += np.bincount(lists[low : min(low + (1 << 20), stop)], minlength=nlist)
    return counts


def _drop(vectors: FloatArray, out: npt.NDArray[np.bool_]) -> FloatArray:
    """The vectors not marked, moved together in place: a copy of the sample would double the memory."""
    kept = np.flatnonzero(~out)
    for low in range(0, len(kept), ASSIGN_ROWS):
        vectors[low : low + ASSIGN_ROWS][: len(kept) - low] = vectors[kept[low : low + ASSIGN_ROWS]]
    return vectors[: len(kept)]
