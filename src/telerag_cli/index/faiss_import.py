"""An index folder from Faiss's file of an index and the passages it is of, in stages that each resume.

As `telerag_cli.index.build` does, everything happens in ``INDEX.partial/``, and the folder gets its name when it is
whole:

=========  ==========================================================  =============================================
stage      what it leaves                                              after a kill
=========  ==========================================================  =============================================
ids        quantizer.npy, offsets.npy, centroids.npy (last)            starts again
passages   passages.arrow                                              starts again
copy       lists.bin, work/copied.json (lists done)                    goes on
seal       checksums.npy, manifest.json (last)                         starts again
=========  ==========================================================  =============================================
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import xxhash

from telerag_cli import __version__
from telerag_cli.arrays import TableArray
from telerag_cli.corpus.embeddings import PASSAGE_SCHEMA
from telerag_cli.corpus.passages import Passage
from telerag_cli.corpus.readers import DOCUMENTS, read_passages
from telerag_cli.corpus.sources import COMPRESSED, Sources
from telerag_cli.errors import InputError, UsageError
from telerag_cli.files import ends_of, read_json, replacing, sized, wrap_os_error, write_json
from telerag_cli.index.artifact import BATCH_ROWS, ID_BYTES, EmbedderInfo, Index, Manifest, lay_out
from telerag_cli.index.faiss_file import FaissFile, check_ids, copy_list
from telerag_cli.index.partial import Draft, save_array, seal
from telerag_cli.index.passages import write_passages
from telerag_cli.index.verify import scan_lists
from telerag_cli.progress import Progress, silent

CHECKPOINT_BYTES = 1 << 30
"""Copied between checkpoints: a second of work to lose or two, against a wait for the disk each."""
UNPACKED = 4
"""Times that packed passages (gzip, Parquet) are larger in the index, for the estimate."""


@dataclass(frozen=True)
class ImportPlan(Draft):
    """What will be imported, and the bytes it takes."""

    file: FaissFile
    passages: Sources
    embedder: str | None
    table: TableArray
    """Size, capacity and offset of the lists in ``lists.bin``."""
    lists_bytes: int
    passages_bytes: int
    """An estimate."""

    made_from: ClassVar[str] = "files"


def plan_import(file: FaissFile, passages: Sources, root: Path, embedder: str | None) -> ImportPlan:
    """Work out sizes, and refuse passages that cannot be matched with vectors: passage number i is that of id i.

    Raises:
        UsageError: the passages are of a kind whose rows are not those of the index.
    """
    for source in passages.files:
        if source.kind in DOCUMENTS:
            raise UsageError(
                f"{source.label} is text without rows, and passage number i must be that of Faiss's id i.",
                remedy="Give the passages as JSONL, TSV, CSV or Parquet, one a row.",
            )
    files = [source.path for source in passages.files if source.path is not None and source.path.is_file()]
    if len(files) < len(passages.files):
        raise UsageError(
            "Passages that come through a pipe cannot be compared when an import resumes, and --passages takes files.",
            remedy="Write them to a file first.",
        )
    digest = xxhash.xxh3_64()
    passages_bytes = 0
    try:
        for path in files:
            size, ends = ends_of(path)
            digest.update(b"%d %b" % (size, ends))
            passages_bytes += size * (UNPACKED if path.suffix in (*COMPRESSED, ".parquet") else 1)
    except OSError as error:
        raise wrap_os_error(error, files[0]) from error
    digests = f"faiss {file.fingerprint()}, passages xxh3:{digest.hexdigest()}"
    table, lists_bytes = lay_out(file.table[:, 0].astype("int64"), file.code_size)
    return ImportPlan(
        root,
        {"files": digests, "embedder": embedder, "version": f"telerag {__version__}"},
        lists_bytes + passages_bytes + file.centroids.nbytes + table.nbytes,
        file,
        passages,
        embedder,
        table,
        lists_bytes,
        passages_bytes,
    )


def import_index(plan: ImportPlan, *, overwrite: bool = False, progress: Progress = silent) -> Index:
    """Import an index, or go on with an interrupted import; a finished one of the same files is opened as it is.

    ``overwrite`` replaces a finished index, and starts over if an interrupted making had other parameters.

    Raises:
        ArtifactError: ``root`` is something else, or was begun or made of other files.
        ResourceError: the disk is full or cannot be written; what was finished is kept.
        InputError: an id is not the number of a passage, a passage cannot be used, or there are more or fewer than
            vectors.
    """
    if not plan.finished(overwrite=overwrite):
        with plan.claimed(overwrite=overwrite, remedy="Free space or choose another output."):
            if not plan.paths.manifest.exists():
                stages = _Import(plan, progress)
                stages.begin()
                stages.write_passages()
                stages.copy()
                stages.seal()
    return Index.open(plan.root)


class _Import:
    """The stages; each looks at what is there and does what is missing."""

    def __init__(self, plan: ImportPlan, progress: Progress) -> None:
        self.plan, self.file, self.paths, self.progress = plan, plan.file, plan.paths, progress

    def begin(self) -> None:
        if self.paths.centroids.exists():
            return
        with self.progress("Checking ids", self.file.ntotal, unit="vectors") as advance:
            check_ids(self.file, advance)
        if self.file.trained is not None:
            save_array(self.paths.quantizer, self.file.trained)
        save_array(self.paths.offsets, self.plan.table)
        save_array(self.paths.centroids, self.file.centroids)

    def write_passages(self) -> None:
        if self.paths.passages.exists():
            return
        ntotal = self.file.ntotal
        passages = read_passages(self.plan.passages)
        written = 0
        with (
            self.progress("Writing passages", ntotal, unit="passages") as advance,
            replacing(self.paths.passages) as temporary,
        ):
            for count in write_passages(_batches(itertools.islice(passages, ntotal)), temporary):
                written += count
                advance(count)
            more = sum(1 for _ in passages)
            if written + more != ntotal:
                raise InputError(
                    f"{self.plan.passages.name} holds {written + more:,} passages, "
                    f"and {self.file.path} holds {ntotal:,} vectors.",
                    remedy="Name the passages that the vectors were made from, all of them, in their order.",
                )

    def copy(self) -> None:
        held, wanted = self.file.table.tolist(), self.plan.table.tolist()
        state = self.plan.work / "copied.json"
        done = int(read_json(state)["lists"]) if state.exists() else 0
        code_bytes = self.file.code_size
        nbytes = [size * (code_bytes + ID_BYTES) for size, _capacity, _offset in held]
        waiting = 0
        with (
            self.progress("Copying lists", sum(nbytes), unit="bytes") as advance,
            self.file.data.open("rb", buffering=0) as source,
            sized(self.paths.lists, self.plan.lists_bytes) as target,
        ):
            advance(sum(nbytes[:done]))
            for number in range(done, len(held)):
                copy_list(source.fileno(), held[number], target, wanted[number], code_bytes, self.file.data)
                waiting += nbytes[number]
                advance(nbytes[number])
                if waiting >= CHECKPOINT_BYTES or number == len(held) - 1:
                    os.fdatasync(target)  # before it is counted as done
                    write_json(state, {"lists": number + 1})
                    waiting = 0

    def seal(self) -> None:
        file, plan = self.file, self.plan
        with self.progress("Checking lists", plan.lists_bytes, unit="bytes") as advance:
            sums, whole = scan_lists(self.paths.lists, plan.table, file.code_size, advance)
        about = Manifest(
            dimension=file.dimension,
            metric=file.metric,
            storage=file.storage,
            nlist=file.nlist,
            ntotal=file.ntotal,
            code_size=file.code_size,
            seed=0,
            embedder=EmbedderInfo(plan.embedder),
            files={},
            trained_on="unknown",
            source=plan.parameters["files"],
            created_by=f"telerag {__version__}",
        )
        seal(self.paths, about, sums, whole, self.progress)


def _batches(passages: Iterator[Passage]) -> Iterator[pa.RecordBatch]:
    while some := list(itertools.islice(passages, BATCH_ROWS)):
        columns = [[p.id for p in some], [p.text for p in some], [p.metadata_json for p in some]]
        yield pa.record_batch([pa.array(column, pa.string()) for column in columns], schema=PASSAGE_SCHEMA)
