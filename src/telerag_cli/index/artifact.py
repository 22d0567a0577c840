"""What an index folder holds, and opening one.

=================  ==========================================================================================
manifest.json      `Manifest`: version, dimension, metric, storage, counts, embedder, sizes and checksums
centroids.npy      float32 (nlist, dimension)
quantizer.npy      float32 (2 * dimension), only for ``int8``: Faiss's trained ``[minima | ranges]`` of ``SQ8``
offsets.npy        uint64 (nlist, 3): size (vectors), capacity (vectors), byte offset of each list in lists.bin
checksums.npy      uint64 (nlist,): xxh3-64 of each list's bytes, padding included
lists.bin          the lists, each ``[codes | int64 row numbers]`` at a multiple of 4 KiB
passages.arrow     Arrow IPC file, memory-mapped: ``id``, ``text``, ``metadata`` (JSON), addressed by row number
vectors.npy        float16 or float32 (ntotal, dimension), memory-mapped, addressed by row number; if kept
=================  ==========================================================================================

A list of ``capacity`` vectors takes ``capacity * (code_size + 8)`` bytes, rounded up to 4 KiB; its row numbers start at
``capacity * code_size``, as in Faiss's ``OnDiskInvertedLists``, so Faiss scans it where it lies.
"""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from telerag_cli.arrays import FloatArray, IntArray, TableArray
from telerag_cli.config import PAGE_BYTES, Metric, Storage
from telerag_cli.errors import ArtifactError
from telerag_cli.files import read_json, write_json

FORMAT = "telerag-index"
VERSION = 1
ID_BYTES = 8


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
        self.vectors = root / "vectors.npy"


@dataclass(frozen=True)
class EmbedderInfo:
    """What made the vectors, so that questions are embedded the same way. Unknown parts are None."""

    model: str | None
    pooling: str | None = None
    normalized: bool | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and checksum (``xxh3:...``) of one file."""

    bytes: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What the index is. Holds no time and no path, so that equal input gives equal bytes."""

    dimension: int
    metric: Metric
    storage: Storage
    nlist: int
    ntotal: int
    code_size: int
    seed: int
    embedder: EmbedderInfo
    files: dict[str, FileInfo]
    balance: dict[str, float] = field(default_factory=dict)
    """List sizes in vectors (min, median, max), empty lists, and Faiss's imbalance factor (1 is even)."""
    recall_at_10: dict[str, float] = field(default_factory=dict)
    """Recall@10 against exact search on held-out queries, by ``nprobe``."""
    recall_queries: int = 0
    """Vectors that were kept out of the training sample and asked as queries."""
    training_rows: int = 0
    """Vectors the coarse quantizer was trained on."""
    trained_on: str = "cpu"
    """``cpu`` or ``cuda``: where k-means ran, which rounds otherwise on each; ``unknown`` of an imported index."""
    kept_vectors: str = ""
    """``float16`` or ``float32``: the type of ``vectors.npy``; empty if there is none."""
    source: str = ""
    """Digest of the embeddings the index was built from."""
    created_by: str = ""

    def save(self, path: Path) -> None:
        """Write ``manifest.json``; it is the last file of an index to appear."""
        write_json(path, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            ArtifactError: missing, of another format or version, or with missing fields.
        """
        if not path.parent.is_dir():
            raise ArtifactError(f"{path.parent} is not an index folder.", remedy="Make one with telerag build-index.")
        if not path.exists():
            raise ArtifactError(
                f"{path.parent} holds no {path.name}, so it is not a finished index.",
                remedy="Run telerag build-index on its embeddings; an interrupted build resumes.",
            )
        raw = read_json(path)
        found = (raw.get("format"), raw.get("version")) if isinstance(raw, dict) else (None, None)
        if found != (FORMAT, VERSION):
            raise ArtifactError(
                f"{path} is {found[0]} version {found[1]}, and this telerag reads {FORMAT} version {VERSION}.",
                remedy="Build the index again with this version.",
            )
        try:
            known: dict[str, Any] = {key: value for key, value in raw.items() if key not in ("format", "version")}
            known["metric"] = Metric(known["metric"])
            known["storage"] = Storage(known["storage"])
            known["embedder"] = EmbedderInfo(**known["embedder"])
            known["files"] = {name: FileInfo(**info) for name, info in known["files"].items()}
            return cls(**known)
        except (TypeError, KeyError, ValueError) as error:
            raise ArtifactError(f"{path} is not a valid manifest: {error}.", remedy="Build the index again.") from error


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
    vectors: npt.NDArray[np.floating] | None = None
    """The kept vectors, float16 or float32 (ntotal, dimension) in row order, memory-mapped; None if none were kept."""

    @classmethod
    def open(cls, root: Path) -> Index:
        """Open and check sizes; bytes are checked by ``telerag inspect --verify``.

        Raises:
            ArtifactError: a file is missing, or its size or shape is not what the manifest says.
        """
        paths = IndexPaths(root)
        manifest = Manifest.load(paths.manifest)
        for name, info in manifest.files.items():
            path = root / name
            size = path.stat().st_size if path.exists() else None
            if size != info.bytes:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise ArtifactError(
                    f"{path} {found}, and its manifest says {info.bytes:,} bytes.",
                    remedy="Restore the file or build the index again.",
                )
        shape = (manifest.nlist, manifest.dimension)
        centroids = _load_array(paths.centroids, np.dtype(np.float32), shape)
        table = _load_array(paths.offsets, np.dtype(np.uint64), (manifest.nlist, 3))
        trained = None
        if manifest.storage is Storage.INT8:
            trained = _load_array(paths.quantizer, np.dtype(np.float32), (2 * manifest.dimension,))
        vectors = None
        if manifest.kept_vectors:
            shape = (manifest.ntotal, manifest.dimension)
            vectors = _load_array(paths.vectors, np.dtype(manifest.kept_vectors), shape, "r")
        return cls(paths, manifest, centroids, table, trained, vectors)

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


def _load_array(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], mapped: Literal["r"] | None = None
) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode=mapped, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as an array: {error}.", remedy="Build the index again.") from error
    if array.dtype != dtype or array.shape != shape:
        raise ArtifactError(
            f"{path} is {array.dtype} {array.shape}, and the manifest asks for {dtype} {shape}.",
            remedy="Build the index again.",
        )
    return array
