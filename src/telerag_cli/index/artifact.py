"""What an index folder holds, and opening one.

=================  ==========================================================================================
manifest.json      `Manifest`: version, dimension, metric, storage, counts, embedder, sizes and checksums, its own too
centroids.npy      float32 (nlist, dimension)
quantizer.npy      float32 (2 * dimension), only for ``int8``: Faiss's trained ``[minima | ranges]`` of ``SQ8``
offsets.npy        uint64 (nlist, 3): size (vectors), capacity (vectors), byte offset of each list in lists.bin
checksums.npy      uint64 (nlist,): xxh3-64 of each list's bytes, padding included
lists.bin          the lists, each ``[codes | int64 row numbers]`` at a multiple of 4 KiB
passages.arrow     Arrow IPC file: ``id``, ``text``, ``metadata`` (JSON), addressed by row number
passages.npy       uint64 (batches,): xxh3-64 of each of its record batches; older indexes have none
vectors.npy        float16 or float32 (ntotal, dimension), addressed by row number; if kept
row_checksums.npy  uint64 (ntotal, 1): xxh3-64 of each row of vectors.npy; older indexes have none
=================  ==========================================================================================

A list of ``capacity`` vectors takes ``capacity * (code_size + 8)`` bytes, rounded up to 4 KiB; its row numbers start at
``capacity * code_size``, as in Faiss's ``OnDiskInvertedLists``, so Faiss scans it where it lies.

An index is not trusted: no number in a file decides about memory or places before it was checked, and all files are
those of one folder, also while another index gets its name.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from telerag_cli.arrays import ByteArray, FloatArray, IntArray, TableArray
from telerag_cli.config import PAGE_BYTES, Metric, Storage
from telerag_cli.errors import ArtifactError, invalid_fields
from telerag_cli.files import HeldFile, HeldFolder, checksum, read_sealed_json, wrap_os_error, write_sealed_json
from telerag_cli.index.npy import AGAIN, ArrayRows, read_array

FORMAT = "telerag-index"
VERSION = 1
ID_BYTES = 8
STRICT = ConfigDict(extra="forbid", strict=True)
BATCH_ROWS = 1024
"""Rows of every record batch of the passages but the last, so that a row's place is a division."""
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class IndexPaths:
    """The files of an index folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = root / "manifest.json"
        self.centroids = root / "centroids.npy"
        self.quantizer = root / "quantizer.npy"
        self.offsets = root / "offsets.npy"
        self.checksums = root / "checksums.npy"
        self.lists = root / "lists.bin"
        self.passages = root / "passages.arrow"
        self.batch_checksums = root / "passages.npy"
        self.vectors = root / "vectors.npy"
        self.row_checksums = root / "row_checksums.npy"


@dataclass(frozen=True)
class EmbedderInfo:
    """What made the vectors, so that questions are embedded the same way. Unknown parts are None."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model: str | None
    pooling: str | None = None
    normalized: bool | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and checksum (``xxh3:...``) of one file."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    bytes: Count
    checksum: Annotated[str, StringConstraints(pattern=r"^xxh3:[0-9a-f]{16}$")]


@dataclass(frozen=True)
class Manifest:
    """What the index is. Holds no time and no path, so that equal input gives equal bytes."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    dimension: Annotated[int, Field(ge=1, lt=1 << 20)]
    metric: Metric
    storage: Storage
    nlist: Annotated[int, Field(ge=1, lt=1 << 31)]
    ntotal: Count
    code_size: Count
    seed: Count
    embedder: EmbedderInfo
    files: dict[str, FileInfo]
    balance: dict[str, float] = field(default_factory=dict)
    """List sizes in vectors (min, median, max), empty lists, and Faiss's imbalance factor (1 is even)."""
    recall_at_10: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")], float] = field(default_factory=dict)
    """Recall@10 against exact search on held-out queries, by ``nprobe``."""
    recall_queries: Count = 0
    """Vectors that were kept out of the training sample and asked as queries."""
    training_rows: Count = 0
    """Vectors the coarse quantizer was trained on."""
    trained_on: str = "cpu"
    """``cpu`` or ``cuda``: where k-means ran, which rounds otherwise on each; ``unknown`` of an imported index."""
    kept_vectors: Annotated[str, StringConstraints(pattern=r"^(float16|float32)?$")] = ""
    """``float16`` or ``float32``: the type of ``vectors.npy``; empty if there is none."""
    source: str = ""
    """Digest of the embeddings the index was built from."""
    created_by: str = ""

    def save(self, path: Path) -> None:
        """Write ``manifest.json``; it is the last file of an index to appear."""
        write_sealed_json(path, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path | HeldFile) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            ArtifactError: missing, of another format or version, changed since it was written, or with fields that are
                missing, of the wrong kind or out of bounds.
        """
        raw = read_sealed_json(path)
        found = (raw.pop("format", None), raw.pop("version", None)) if isinstance(raw, dict) else (None, None)
        if found != (FORMAT, VERSION):
            raise ArtifactError(
                f"{path} is {found[0]} version {found[1]}, and this telerag reads {FORMAT} version {VERSION}.",
                remedy="Build the index again with this version.",
            )
        try:
            manifest = _reader().validate_json(json.dumps(raw))  # strict, and enumerations are texts in JSON
        except ValidationError as error:
            raise invalid_fields(f"{path} is not a valid manifest", error, "Build the index again.") from error
        manifest._check(path)
        return manifest

    def _check(self, path: Path | HeldFile) -> None:
        wanted = code_size(self.dimension, self.storage)
        if self.code_size != wanted:
            raise ArtifactError(
                f"{path} has vectors of {self.code_size:,} bytes, and {self.storage} of {self.dimension:,} dimensions "
                f"takes {wanted:,}.",
                remedy="Build the index again.",
            )
        paths = IndexPaths(Path())
        needed = {paths.centroids, paths.offsets, paths.checksums, paths.lists, paths.passages}
        needed |= {paths.quantizer} if self.storage is Storage.INT8 else set()
        needed |= {paths.vectors} if self.kept_vectors else set()
        later = {paths.batch_checksums.name} | ({paths.row_checksums.name} if self.kept_vectors else set())
        names, found = {each.name for each in needed}, set(self.files) - later
        if found != names:
            odd = ", ".join(sorted(found ^ names))
            raise ArtifactError(
                f"{path} names {len(found)} files, and such an index has {len(names)}: {odd} should or should not be "
                "there.",
                remedy="Build the index again.",
            )


@cache
def _reader() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def code_size(dimension: int, storage: Storage) -> int:
    """Bytes of one stored vector: 4, 2 or 1 per dimension."""
    return dimension * {Storage.FLOAT32: 4, Storage.FLOAT16: 2, Storage.INT8: 1}[storage]


def lay_out(sizes: npt.NDArray[np.int64], code_bytes: int) -> tuple[TableArray, int]:
    """Where lists of these sizes, (nlist,) in vectors, lie in ``lists.bin``.

    The capacity is the least one not below the size for which the row numbers are 8-byte aligned.

    Returns:
        The table (nlist, 3) of size, capacity and byte offset, and the length of the file in bytes.
    """
    step = ID_BYTES // math.gcd(code_bytes, ID_BYTES)
    capacity = -(-sizes // step) * step
    list_bytes = extent_bytes(capacity.astype(np.uint64), code_bytes)
    offsets = np.concatenate([[0], np.cumsum(list_bytes)]).astype(np.uint64)
    table = np.stack([sizes.astype(np.uint64), capacity.astype(np.uint64), offsets[:-1]], axis=1)
    return np.ascontiguousarray(table), int(offsets[-1])


def extent_bytes(capacity: TableArray, code_bytes: int) -> IntArray:
    """Bytes each list takes in ``lists.bin`` and in an arena: codes, row numbers, and padding to 4 KiB."""
    used = capacity.astype(np.int64) * (code_bytes + ID_BYTES)
    return -(-used // PAGE_BYTES) * PAGE_BYTES


def lay_out_vectors(rows: int, dimension: int, kept: str) -> tuple[bytes, int]:
    """The header that ``vectors.npy`` begins with, and the bytes of each row after it; empty and 0 if ``kept`` is."""
    if not kept:
        return b"", 0
    dtype, header = np.dtype(kept), io.BytesIO()
    about = {"descr": dtype.str, "fortran_order": False, "shape": (rows, dimension)}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue(), dimension * dtype.itemsize


@dataclass(frozen=True)
class Index:
    """An opened index: small parts in memory, lists, passages and kept vectors on disk."""

    paths: IndexPaths
    manifest: Manifest
    centroids: FloatArray
    table: TableArray
    trained: FloatArray | None
    """Faiss's trained ranges for ``int8``, else None."""
    vectors: ArrayRows | None = None
    """The kept vectors, float16 or float32 (ntotal, dimension) in row order, on disk; None if none were kept."""
    checksums: TableArray | None = None
    """xxh3-64 of each list's bytes, uint64 (nlist,); None of an index that was not opened."""
    batch_checksums: TableArray | None = None
    """xxh3-64 of each record batch of the passages, uint64 (batches,); None if the index has none."""
    files: Mapping[str, HeldFile] = field(default_factory=dict)
    """The files of the manifest, held open, by name."""

    @classmethod
    def open(cls, root: Path) -> Index:
        """Open all files and check what is in the small ones; ``telerag inspect --verify`` checks every byte.

        Raises:
            ArtifactError: a file is missing, or is not what the manifest says.
        """
        while True:
            try:
                folder = HeldFolder(root)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise ArtifactError(
                    f"{root} is not an index folder.", remedy="Make one with telerag build-index."
                ) from error
            except OSError as error:
                raise wrap_os_error(error, root) from error
            try:
                return cls._of(folder)
            except ArtifactError:
                if not folder.replaced():
                    raise  # otherwise a publisher has taken its files away: there is a new index

    @classmethod
    def _of(cls, folder: HeldFolder) -> Index:
        paths = IndexPaths(folder.path)
        if not folder.has(paths.manifest.name):
            raise ArtifactError(
                f"{folder.path} holds no {paths.manifest.name}, so it is not a finished index.",
                remedy="Run telerag build-index on its embeddings; an interrupted build resumes.",
            )
        manifest = Manifest.load(folder.open(paths.manifest.name))
        files = {name: folder.open(name) for name in manifest.files}
        for name, info in manifest.files.items():
            if files[name].size != info.bytes:
                raise ArtifactError(
                    f"{files[name]} has {files[name].size:,} bytes, and its manifest says {info.bytes:,} bytes.",
                    remedy=AGAIN,
                )
        large = {paths.lists.name, paths.passages.name, paths.vectors.name, paths.row_checksums.name}
        for name in manifest.files.keys() - large:  # of the large ones each part is checked when it is read
            if (found := checksum(files[name])) != manifest.files[name].checksum:
                raise ArtifactError(
                    f"{files[name]} has the checksum {found}, and its manifest says {manifest.files[name].checksum}.",
                    remedy=AGAIN,
                )
        nlist, dimension = manifest.nlist, manifest.dimension

        def array(path: Path, dtype: Any, *shape: int) -> npt.NDArray[Any]:
            return read_array(files[path.name], np.dtype(dtype), shape)

        centroids = array(paths.centroids, np.float32, nlist, dimension)
        table = array(paths.offsets, np.uint64, nlist, 3)
        _check_table(table, manifest, files[paths.offsets.name], files[paths.lists.name])
        trained = array(paths.quantizer, np.float32, 2 * dimension) if manifest.storage is Storage.INT8 else None
        vectors = None
        if manifest.kept_vectors:
            sums = files.get(paths.row_checksums.name)
            vectors = ArrayRows(
                files[paths.vectors.name],
                np.dtype(manifest.kept_vectors),
                (manifest.ntotal, dimension),
                ArrayRows(sums, np.dtype(np.uint64), (manifest.ntotal, 1)) if sums else None,
            )
        batch_checksums = None
        if paths.batch_checksums.name in files:
            batch_checksums = array(paths.batch_checksums, np.uint64, -(-manifest.ntotal // BATCH_ROWS))
        checksums = array(paths.checksums, np.uint64, nlist)
        return cls(paths, manifest, centroids, table, trained, vectors, checksums, batch_checksums, files)

    def held(self, path: Path) -> Path | HeldFile:
        """The file of this path among `files`, or the path itself of an index that was not opened."""
        return self.files.get(path.name, path)

    def check_list(self, number: int, data: ByteArray) -> None:
        """Compare the bytes of a list with its checksum, and the rows it names with those there are.

        Raises:
            ArtifactError: one of them is wrong.
        """
        assert self.checksums is not None
        found, wanted = xxhash.xxh3_64_intdigest(data.data), int(self.checksums[number])
        if found != wanted:
            raise ArtifactError(
                f"List {number:,} of {self.paths.lists} has the checksum {found:016x}, and {wanted:016x} was written.",
                remedy="Check it with telerag inspect --verify, and restore it or build the index again.",
            )
        size, capacity, _offset = map(int, self.table[number])
        begin = capacity * self.manifest.code_size
        rows = data[begin : begin + size * ID_BYTES].view(np.uint64)
        if size and (last := int(rows.max())) >= self.manifest.ntotal:
            raise ArtifactError(
                f"List {number:,} of {self.paths.lists} names row {last:,}, and there are {self.manifest.ntotal:,}.",
                remedy="Build the index again.",
            )

    @cached_property
    def list_bytes(self) -> IntArray:
        """Bytes each list takes, padding included, shape (nlist,)."""
        return extent_bytes(self.table[:, 1], self.manifest.code_size)

    @property
    def offsets(self) -> IntArray:
        """Byte offset of each list in ``lists.bin``, shape (nlist,)."""
        return self.table[:, 2].astype(np.int64)

    @property
    def sizes(self) -> IntArray:
        """Vectors in each list, shape (nlist,)."""
        return self.table[:, 0].astype(np.int64)


def _check_table(table: TableArray, manifest: Manifest, path: HeldFile, lists: HeldFile) -> None:
    """Make sure that lists lie in ``lists.bin`` side by side, aligned, and hold what they have room for."""
    size, capacity, offset = table.T
    code_bytes, length = manifest.code_size, lists.size
    # First what keeps the sums below from running over.
    good = (capacity <= length // (code_bytes + ID_BYTES)) & (offset <= length)
    ends = np.where(good, offset, 0).astype(np.int64) + extent_bytes(np.where(good, capacity, 0), code_bytes)
    good &= (size <= capacity) & (capacity * np.uint64(code_bytes) % ID_BYTES == 0)
    good &= (offset % PAGE_BYTES == 0) & (ends <= length)
    if not good.all():
        number = int(np.flatnonzero(~good)[0])
        raise ArtifactError(
            f"{path} says that list {number:,} has {size[number]:,} vectors in room for {capacity[number]:,} at byte "
            f"{offset[number]:,}, and {lists.path.name} has {length:,} bytes.",
            remedy=AGAIN,
        )
    order = np.lexsort((ends, offset))
    over = np.flatnonzero(ends[order][:-1] > offset[order][1:].astype(np.int64))
    if len(over):
        one, other = order[over[0]], order[over[0] + 1]
        raise ArtifactError(
            f"{path} says that list {one:,} ends at byte {ends[one]:,} and list {other:,} begins at {offset[other]:,}.",
            remedy=AGAIN,
        )
    if (total := int(size.sum())) != manifest.ntotal:
        raise ArtifactError(
            f"{path} has {total:,} vectors in its lists, and the manifest says {manifest.ntotal:,}.", remedy=AGAIN
        )
