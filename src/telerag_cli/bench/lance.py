"""LanceDB's IVF on disk, over the very vectors, centroids and lists of an index.

INDEX.lancedb/                 a LanceDB database, beside the index so that both are read from the same disk
INDEX.lancedb/made.json        from what it was made, and the size of each file; the last of them to appear
INDEX.lancedb/vectors.lance/   the table of ``row`` and ``vector``, list by list, and its ``IVF_FLAT`` index
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.bench.baselines import Plain, read_lists
from telerag_cli.config import Metric, Storage
from telerag_cli.engine.opening import OpenedIndex
from telerag_cli.errors import ArtifactError, ResourceError, UsageError
from telerag_cli.files import check_disk, read_json, wrap_os_error, write_json
from telerag_cli.index.artifact import ID_BYTES, Index
from telerag_cli.index.partial import partial_of
from telerag_cli.index.scoring import faiss_threads, nothing
from telerag_cli.progress import Advance, Progress

FORMAT = "telerag-lancedb"
VERSION = 1
TABLE, ROW, VECTOR = "vectors", "row", "vector"
INDEX_TYPE, INDEX_NAME = "IVF_FLAT", "lists"
LOCK = "lock"
QUIET = {"LANCE_LOG": "error", "LANCE_INCLUDE_VECTOR_CENTROIDS": "false"}
"""Or Lance warns of every new dataset, and of centroids in statistics of which we take no more than sizes."""
PARTITIONS = pa.schema({"row_id": pa.uint64(), "partition": pa.uint32()})
MAX_ROWS = 2**32 - 1
"""Of a file: Lance takes no larger number."""
METRICS = {Metric.IP: "dot", Metric.L2: "l2"}
CACHE_BYTES = 6 << 30
"""Of partitions that LanceDB may hold in memory: its own default, given so that a report can tell."""
COPIES = 3
"""Of the vectors, on the disk while the index is made: the table, the index, and what Lance sorts them in."""


class LanceSearch(Plain):
    """A search of the table through LanceDB, with caches that last from `map` to `unmap`."""

    def __init__(self, index: Index, database: Path) -> None:
        super().__init__(index)
        self.session: Any = None
        """LanceDB's caches; None while nothing is open."""
        self._database = database
        self._table: Any = None

    def unmap(self) -> None:
        """Close the table and drop all that LanceDB has cached of it."""
        self._table = self.session = None

    def map(self) -> None:
        """Open the table and its index, unless they are open; raises ResourceError if LanceDB is not installed."""
        if self._table is not None:
            return
        lancedb = _imported("lancedb")
        self.session = lancedb.Session(index_cache_size_bytes=CACHE_BYTES)
        self._table = lancedb.connect(self._database, session=self.session).open_table(TABLE)
        # The first question opens an index, and Faiss has its centroids in memory before the clock runs too. A short
        # list, so that no more than that comes into memory.
        shortest = np.where(self.index.sizes > 0, self.index.sizes, np.iinfo(np.int64).max).argmin()
        self.find(self.index.centroids[shortest][None], 1, 1)

    def find(self, queries: FloatArray, k: int, nprobe: int) -> tuple[FloatArray, IntArray]:
        """See `Plain`; all queries are asked at once, which takes LanceDB a third of the time."""
        metric, n = self.index.manifest.metric, len(queries)
        question = self._table.search(queries if n > 1 else queries[0], vector_column_name=VECTOR)
        question = question.nprobes(min(nprobe, self.index.manifest.nlist)).limit(k)
        found = question.select([ROW, "_distance"]).to_arrow()
        who = found["query_index"].to_numpy() if n > 1 else np.zeros(len(found), np.int64)
        distances, numbers = found["_distance"].to_numpy(), found[ROW].to_numpy()
        order = np.lexsort((numbers, distances, who))
        starts = np.searchsorted(who[order], np.arange(n))
        place = np.arange(len(order)) - starts[who[order]]
        scores, rows = nothing(n, k, metric)
        # Lance calls 1 minus the inner product a distance.
        scores[who[order], place] = (1 - distances if metric is Metric.IP else distances)[order]
        rows[who[order], place] = numbers[order]
        return scores, rows


def open_lance(opened: OpenedIndex, progress: Progress) -> tuple[LanceSearch, dict[str, Any], tuple[Path, ...]]:
    """Return a closed search through LanceDB, its configuration, and the files it reads; make its table if need be.

    Raises:
        UsageError: the index does not store floats.
        ResourceError: LanceDB or room on the disk is missing, or another process is making the table.
        ArtifactError: something else is where the table should be.
    """
    index = opened.index
    manifest = index.manifest
    if manifest.storage is Storage.INT8:
        raise UsageError(
            f"--system lancedb compares vectors of floats, and {index.paths.root} stores {manifest.storage}.",
            remedy="Build the index with --storage float32 or float16, or leave out --system lancedb.",
        )
    for name, value in {"LANCE_CPU_THREADS": str(faiss_threads()), **QUIET}.items():
        os.environ.setdefault(name, value)  # read when Lance is loaded, or first used
    lancedb = _imported("lancedb")
    root = index.paths.root.absolute()
    database = root.with_name(f"{root.name}.lancedb")
    made = _kept(index, database) or _make(index, database, progress)
    configuration = {
        "what": "LanceDB: the same vectors in the same lists, as float32, in a table of its own on the same disk",
        "lancedb": lancedb.__version__,
        "pylance": made["pylance"],
        "index_type": INDEX_TYPE,
        "partitions": manifest.nlist,
        "centroids": "those of the index",
        "metric": METRICS[manifest.metric],
        "index_cache_bytes": CACHE_BYTES,
        "threads": int(os.environ["LANCE_CPU_THREADS"]),
    }
    return LanceSearch(index, database), configuration, tuple(database / name for name in made["files"])


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = {"lance": "pylance"}.get(str(error.name), error.name)
        raise ResourceError(
            f"--system lancedb needs the package {package}, and it is not installed.",
            remedy="Install the extra lancedb, or: pip install 'lancedb[pylance]'.",
        ) from error


def _made(index: Index, pylance: str | None, files: dict[str, int]) -> dict[str, Any]:
    """Return what ``made.json`` says: the checksums of what the table is made from, and its files with their bytes."""
    paths = (index.paths.centroids, index.paths.offsets, index.paths.lists)
    source = {path.name: index.manifest.files[path.name].checksum for path in paths}
    return {"format": FORMAT, "version": VERSION, "source": source, "pylance": pylance, "files": files}


def _kept(index: Index, database: Path) -> dict[str, Any] | None:
    """Return what was made before, if it is of this index and whole."""
    path = database / "made.json"
    made = read_json(path) if path.exists() else None
    if isinstance(made, dict) and made.get("format") == FORMAT:
        return made if made == _made(index, made.get("pylance"), _files_in(database)) else None
    if database.exists() and not (database.is_dir() and not any(database.iterdir())):
        raise ArtifactError(
            f"{database} exists and is not what telerag makes for --system lancedb.", remedy="Move it elsewhere."
        )
    return None


def _files_in(database: Path) -> dict[str, int]:
    paths = sorted((database / f"{TABLE}.lance").rglob("*"))
    return {str(path.relative_to(database)): path.stat().st_size for path in paths if path.is_file()}


def _make(index: Index, database: Path, progress: Progress) -> dict[str, Any]:
    """Make the table in a folder beside, which gets its name when everything is there."""
    lance, manifest, partial = _imported("lance"), index.manifest, partial_of(database)
    vectors_bytes = manifest.ntotal * (manifest.dimension * 4 + ID_BYTES)
    try:
        with _claimed(partial):
            check_disk(database, COPIES * vectors_bytes, "Free space, or leave out --system lancedb.")
            _fill(lance, index, partial, progress)
            made = _made(index, lance.__version__, _files_in(partial))
            write_json(partial / "made.json", made)
            if database.exists():
                shutil.rmtree(database)
            partial.rename(database)
            (database / LOCK).unlink()
            return made
    except OSError as error:
        raise wrap_os_error(error, database) from error


@contextlib.contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """Keep others out of the folder in which a table is made, empty before and gone after a failure."""
    partial.mkdir(exist_ok=True)
    with (partial / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(f"Another telerag is making {partial} right now.", remedy="Wait for it.") from None
        for left in partial.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
        try:
            yield
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _fill(lance: Any, index: Index, partial: Path, progress: Progress) -> None:
    """Write the table and its index."""
    manifest, work = index.manifest, partial / "work"
    work.mkdir()
    with progress("Copying lists to LanceDB", int(index.list_bytes.sum()), unit="bytes") as advance:
        dataset = _write(lance, _schema(index), _batches(index, advance), partial / f"{TABLE}.lance")
    lists = _write(lance, PARTITIONS, _partitions(index, dataset), work / "partitions.lance")
    with progress("Building LanceDB's index", None), _temporary_files_in(work):
        dataset.create_index(
            VECTOR,
            INDEX_TYPE,
            INDEX_NAME,
            metric=METRICS[manifest.metric],
            num_partitions=manifest.nlist,
            ivf_centroids=index.centroids,
            # Lance would assign anew: five times as long, and otherwise where stored vectors are rounded.
            precomputed_partition_dataset=lists.uri,
        )
        _check(lance, dataset, index)
        for name in _files_in(partial):
            with (partial / name).open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(work)


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Have Lance sort all vectors here: ``/tmp`` may be small, or memory."""
    before = dict(os.environ)
    os.environ["TMPDIR"] = os.fspath(folder)
    try:
        yield
    finally:
        del os.environ["TMPDIR"]
        os.environ.update(before)


def _write(lance: Any, schema: pa.Schema, batches: Iterator[pa.RecordBatch], path: Path) -> Any:
    """A new Lance dataset, of one file as far as Lance allows it."""
    failed: list[BaseException] = []

    def watched() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except BaseException as error:
            failed.append(error)
            raise

    reader = pa.RecordBatchReader.from_batches(schema, watched())
    try:
        return lance.write_dataset(reader, os.fspath(path), max_rows_per_file=MAX_ROWS)
    except OSError:
        # What goes wrong in here comes back from Lance as an OSError that quotes a traceback.
        if failed:
            raise failed[0] from None
        raise


def _schema(index: Index) -> pa.Schema:
    return pa.schema({ROW: pa.int64(), VECTOR: pa.list_(pa.float32(), index.manifest.dimension)})


def _batches(index: Index, advance: Advance) -> Iterator[pa.RecordBatch]:
    """Yield rows and vectors, list by list: never more than a list in memory."""
    kind = np.float16 if index.manifest.storage is Storage.FLOAT16 else np.float32
    for _number, codes, rows in read_lists(index, advance):
        vectors = pa.array(codes.view(kind).astype(np.float32, copy=False))
        columns = [pa.array(rows), pa.FixedSizeListArray.from_arrays(vectors, index.manifest.dimension)]
        yield pa.record_batch(columns, schema=_schema(index))


def _partitions(index: Index, dataset: Any) -> Iterator[pa.RecordBatch]:
    """In which list each row of the table is, as Lance takes it: by the row's id."""
    lists = np.repeat(np.arange(index.manifest.nlist, dtype=np.uint32), index.sizes)
    place = 0
    for batch in dataset.to_batches(columns=[], with_row_id=True):
        numbers = pa.array(lists[place : place + len(batch)])
        yield pa.record_batch([batch.column("_rowid"), numbers], schema=PARTITIONS)
        place += len(batch)


def _check(lance: Any, dataset: Any, index: Index) -> None:
    """See that Lance has put the vectors in the lists that it was told, or it would find less, unnoticed."""
    about = dataset.stats.index_stats(INDEX_NAME)["indices"][0]
    sizes = np.array([partition["size"] for partition in about["partitions"]])
    if not np.array_equal(sizes, index.sizes):
        raise ResourceError(
            f"pylance {lance.__version__} made {len(sizes):,} partitions with {sizes.sum():,} vectors, "
            f"and they are not the {index.manifest.nlist:,} lists of {index.paths.root} "
            f"with {index.manifest.ntotal:,}.",
            remedy="Install another pylance: 14.0.2 is one that works.",
        )
