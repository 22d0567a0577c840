"""Faiss's own file of an inverted-file index: its header read, its lists found where they lie, and such files written.

Faiss's own reader takes memory for whatever a damaged header says, and reads the lists; this one does neither.
Only what we can represent is read: ``IndexIVFFlat``, and ``IndexIVFScalarQuantizer`` of the types fp16 and 8bit without
residuals, by inner product or L2, with a flat coarse quantizer of the same metric. All numbers are little-endian::

    "IwFl" or "IwSq"  d:i32 ntotal:i64 16 unused bytes  trained:u8 metric:i32  nlist:u64 nprobe:u64
    the quantizer, a file of its own kind: "IxFI" (inner product) or "IxF2" (L2)  the same header  floats:u64 f32...
    direct map:       kind:u8  numbers:u64 i64...  and of kind 2  pairs:u64 (i64 i64)...
    of "IwSq" only:   kind:i32 rangestat:i32 f32  d:u64 code_size:u64  floats:u64 f32...  code_size:u64 by_residual:u8
    "ilar"            nlist:u64 code_size:u64  "full" nlist:u64 size:u64... | "sprs" 2n:u64 (list:u64 size:u64)...
                      then of each list its codes and its int64 ids
    or "ilod"         nlist:u64 code_size:u64  3*nlist:u64 (size capacity offset)...  2n:u64 (offset capacity)...
                      characters:u64 name of the data file  bytes of it:u64

In an ``ilod``'s data file each list is ``[codes | ids]`` with room for ``capacity`` of each: the layout of our
``lists.bin``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import faiss
import numpy as np
import numpy.typing as npt
import xxhash

from telerag_cli.arrays import FloatArray, IntArray, TableArray
from telerag_cli.config import Metric, Storage
from telerag_cli.errors import InputError
from telerag_cli.files import CHUNK_BYTES, ends_of, read_exactly, wrap_os_error, write_at
from telerag_cli.index.artifact import ID_BYTES, code_size
from telerag_cli.index.scoring import SCALAR_KINDS
from telerag_cli.progress import Advance

FLAT, SCALAR, SCALAR_RESIDUAL = b"IwFl", b"IwSq", b"IwSQ"
METRICS = {0: Metric.IP, 1: Metric.L2}
QUANTIZERS = {b"IxFI": Metric.IP, b"IxF2": Metric.L2}
STORAGES = {kind: storage for storage, kind in SCALAR_KINDS.items()}
SCALAR_NAMES = {
    getattr(faiss.ScalarQuantizer, name): name.removeprefix("QT_")
    for name in dir(faiss.ScalarQuantizer)
    if name.startswith("QT_") and name != "QT_count"
}
KNOWN = {
    "IxF": "IndexFlat",
    "IxPT": "IndexPreTransform",
    "IxM": "IndexIDMap",
    "IxRF": "IndexRefineFlat",
    "IxPq": "IndexPQ",
    "IxSQ": "IndexScalarQuantizer",
    "IHN": "IndexHNSW",
    "INSf": "IndexNSGFlat",
    "IwPQ": "IndexIVFPQ",
    "IwQR": "IndexIVFPQR",
    "IwPf": "IndexIVFPQFastScan",
    "IwFd": "IndexIVFFlatDedup",
    "IwSh": "IndexIVFSpectralHash",
    "IwIQ": "IndexIVFIndependentQuantizer",
    "IxHe": "IndexLSH",
    "IvFl": "IndexIVFFlat of before Faiss 1.5",
    "IvFL": "IndexIVFFlat of before Faiss 1.5",
    "IvSQ": "IndexIVFScalarQuantizer of before Faiss 1.5",
    "IvPQ": "IndexIVFPQ of before Faiss 1.5",
    "IB": "IndexBinary",
}
"""Faiss's names for other types, by how their files begin."""
WRAPPERS = ("IxPT", "IxM", "IxRF")
CHECKED_IDS = 1 << 18


@dataclass(frozen=True)
class FaissFile:
    """An index in Faiss's file: what its header says, and where its lists lie."""

    path: Path
    data: Path
    """The file that the lists are in: ``path``, or the data file of an ``OnDiskInvertedLists``."""
    metric: Metric
    storage: Storage
    centroids: FloatArray
    """(nlist, dimension)."""
    trained: FloatArray | None
    """Minima and ranges of ``int8``, (2 * dimension,)."""
    table: TableArray
    """Size and capacity in vectors and byte offset in ``data`` of each list, (nlist, 3); ids are after the capacity."""

    @property
    def dimension(self) -> int:
        """Dimension of the vectors."""
        return int(self.centroids.shape[1])

    @property
    def nlist(self) -> int:
        """Number of lists."""
        return len(self.centroids)

    @property
    def ntotal(self) -> int:
        """Number of vectors in all lists."""
        return int(self.table[:, 0].sum())

    @property
    def code_size(self) -> int:
        """Bytes of one stored vector."""
        return code_size(self.dimension, self.storage)

    def fingerprint(self) -> str:
        """A digest that another index would not have: of the centroids, the sizes, and the ends of the files."""
        digest = xxhash.xxh3_64(self.table.tobytes())
        digest.update(self.centroids.tobytes())
        for path in dict.fromkeys((self.path, self.data)):
            digest.update(b"%d %b" % ends_of(path))
        return f"xxh3:{digest.hexdigest()}"


def read_faiss(path: Path) -> FaissFile:
    """Read the header; memory is taken for the centroids and the sizes of the lists, not for what is in them.

    Raises:
        InputError: no such file, not Faiss's, an index that cannot be represented, or a file that ends early or
            contradicts itself.
        ResourceError: it cannot be read.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}.", remedy="Name a file that faiss.write_index made.")
    try:
        with path.open("rb") as handle:
            return _Header(path, handle).read()
    except OSError as error:
        raise wrap_os_error(error, path) from error


def _known(kind: bytes) -> str:
    name = kind.decode("latin-1")
    return next((KNOWN[name[:n]] for n in (4, 3, 2) if name[:n] in KNOWN), f"an index of the type '{name}'")


class _Header:
    """Reads one file from its beginning; every number is checked before it decides how much memory to take."""

    def __init__(self, path: Path, handle: IO[bytes]) -> None:
        self.path, self.handle = path, handle
        self.size = os.fstat(handle.fileno()).st_size

    def read(self) -> FaissFile:
        kind = self.handle.read(4)
        self._refuse_other_types(kind)
        dimension, ntotal, metric = self._index_header()
        if metric not in METRICS:
            raise InputError(
                f"{self.path} compares vectors by Faiss's metric {metric}, and telerag by 0 (inner product) or 1 (L2).",
                remedy="Build the index with one of these.",
            )
        nlist, _nprobe = self._take("<QQ")
        centroids = self._quantizer(nlist, dimension, METRICS[metric])
        self._direct_map()
        storage, trained = (Storage.FLOAT32, None) if kind == FLAT else self._scalar_quantizer(dimension)
        data, table = self._lists(nlist, code_size(dimension, storage))
        if not ntotal:
            raise InputError(f"{self.path} holds no vectors.", remedy="Add vectors before it is written.")
        if int(table[:, 0].sum()) != ntotal:
            self._damaged(f"its lists hold {int(table[:, 0].sum()):,} vectors, and its header says {ntotal:,}")
        return FaissFile(self.path, data, METRICS[metric], storage, centroids, trained, table)

    def _refuse_other_types(self, kind: bytes) -> None:
        if kind in (FLAT, SCALAR):
            return
        if kind == SCALAR_RESIDUAL:
            raise self._residual("IndexIVFScalarQuantizer of before Faiss 1.6")
        name = kind.decode("latin-1")
        if len(kind) < 4 or not name.isalnum() or not name.startswith("I"):
            raise InputError(
                f"{self.path} begins with {kind!r}, and a Faiss index with {FLAT!r} or {SCALAR!r}.",
                remedy="Name a file that faiss.write_index made.",
            )
        remedy = "Import the index inside: faiss.write_index(faiss.downcast_index(index.index), 'inner.index')."
        if not name.startswith(WRAPPERS):
            remedy = "Build one of these, or let telerag embed and telerag build-index make an index of the passages."
        raise InputError(
            f"{self.path} is {_known(kind)}, and telerag imports IndexIVFFlat, and IndexIVFScalarQuantizer of fp16 or "
            "8bit.",
            remedy=remedy,
        )

    def _index_header(self) -> tuple[int, int, int]:
        dimension, ntotal, _, _, trained, metric = self._take("<iqqqBi")
        if metric > 1:
            self._take("<f")  # the metric's argument
        if dimension < 1 or ntotal < 0:
            self._damaged(f"it says that it has {ntotal:,} vectors of {dimension:,} dimensions")
        if not trained:
            raise InputError(f"{self.path} is not trained.", remedy="Train it and add vectors before it is written.")
        return dimension, ntotal, metric

    def _quantizer(self, nlist: int, dimension: int, metric: Metric) -> FloatArray:
        (kind,) = self._take("4s")
        if kind not in QUANTIZERS:
            raise InputError(
                f"The coarse quantizer of {self.path} is {_known(kind)}, and telerag takes IndexFlat of inner "
                "product or L2.",
                remedy="Put its centroids into a faiss.IndexFlat: index.quantizer.reconstruct_n().",
            )
        if QUANTIZERS[kind] is not metric:
            raise InputError(
                f"The coarse quantizer of {self.path} ranks lists by {QUANTIZERS[kind]}, and its vectors by {metric}.",
                remedy="Give the index a quantizer of its own metric.",
            )
        found_dimension, count, _ = self._index_header()
        values = self._array(np.float32)
        if (found_dimension, count, len(values)) != (dimension, nlist, nlist * dimension) or not nlist:
            self._damaged(
                f"its quantizer has {count:,} centroids of {found_dimension:,} dimensions, and it says {nlist:,} lists "
                f"of {dimension:,}"
            )
        return values.reshape(nlist, dimension)

    def _direct_map(self) -> None:
        (kind,) = self._take("<B")
        self._skip(8)
        if kind == 2:
            self._skip(16)

    def _scalar_quantizer(self, dimension: int) -> tuple[Storage, FloatArray | None]:
        kind, _, _, _, _ = self._take("<iifQQ")
        trained = self._array(np.float32)
        _, by_residual = self._take("<QB")
        if kind not in STORAGES:
            name = SCALAR_NAMES.get(kind, kind)
            raise InputError(
                f"{self.path} is IndexIVFScalarQuantizer of {name}, and telerag imports it of fp16 or 8bit.",
                remedy="Build one of these.",
            )
        if by_residual:
            raise self._residual("IndexIVFScalarQuantizer")
        if STORAGES[kind] is not Storage.INT8:
            return STORAGES[kind], None
        if len(trained) != 2 * dimension:
            self._damaged(f"its 8bit quantizer has {len(trained):,} numbers, and needs {2 * dimension:,}")
        return Storage.INT8, trained

    def _residual(self, name: str) -> InputError:
        return InputError(
            f"{self.path} is {name} with by_residual = True, whose codes are of what a vector differs from its "
            "centroid by, and telerag's are of the vector itself (by_residual = False).",
            remedy="Build it with faiss.IndexIVFScalarQuantizer(quantizer, d, nlist, type, metric, False), or with "
            "telerag build-index.",
        )

    def _lists(self, nlist: int, code_bytes: int) -> tuple[Path, TableArray]:
        (kind,) = self._take("4s")
        if kind == b"il00":
            raise InputError(f"{self.path} has no lists in it.", remedy="Write it together with its lists.")
        if kind not in (b"ilar", b"ilod"):
            raise InputError(
                f"The lists of {self.path} are of the type {kind!r}, and telerag reads ArrayInvertedLists and "
                "OnDiskInvertedLists.",
                remedy="Write it with one of these.",
            )
        found_nlist, found_code = self._take("<QQ")
        if (found_nlist, found_code) != (nlist, code_bytes):
            self._damaged(
                f"it has {found_nlist:,} lists of codes of {found_code:,} bytes, and its header says {nlist:,} of "
                f"{code_bytes:,}"
            )
        data, table = self._array_lists(nlist, code_bytes) if kind == b"ilar" else self._disk_lists(nlist)
        size, capacity, offset = (column.astype(object) for column in table.T)  # a damaged file may exceed any type
        length = data.stat().st_size
        reach = max((offset + capacity * (code_bytes + ID_BYTES))[size > 0], default=0)
        if reach > length:
            raise InputError(
                f"{data} ends at byte {length:,}, and its lists reach to byte {reach:,}.",
                remedy="Fetch it again; it is not whole.",
            )
        if (size > capacity).any():
            self._damaged("a list holds more than it has room for")
        return data, table

    def _array_lists(self, nlist: int, code_bytes: int) -> tuple[Path, TableArray]:
        (form,) = self._take("4s")
        sizes = np.zeros(nlist, np.uint64)
        if form == b"full":
            found = self._array(np.uint64)
            if len(found) != nlist:
                self._damaged(f"it has {len(found):,} sizes of {nlist:,} lists")
            sizes[:] = found
        elif form == b"sprs":
            pairs = self._array(np.uint64)
            if len(pairs) % 2 or (len(pairs) and int(pairs[::2].max()) >= nlist):
                self._damaged(f"it has the size of a list that is not among its {nlist:,}")
            sizes[pairs[::2].astype(np.int64)] = pairs[1::2]
        else:
            self._damaged(f"the sizes of its lists are written in the form {form!r}")
        used = np.concatenate([[0], np.cumsum(sizes.astype(np.float64) * (code_bytes + ID_BYTES))])
        begin = self.handle.tell()
        if begin + used[-1] > 2.0**62:
            self._damaged("its lists are larger than any file")
        exact = np.concatenate([[0], np.cumsum(sizes[:-1] * np.uint64(code_bytes + ID_BYTES))]) + begin
        return self.path, np.stack([sizes, sizes, exact.astype(np.uint64)], axis=1)

    def _disk_lists(self, nlist: int) -> tuple[Path, TableArray]:
        # Counted in entries of three numbers, and the free slots in entries of two.
        table = self._array(np.uint64, 3).reshape(-1, 3)
        self._skip(16)
        name = os.fsdecode(self._array(np.uint8).tobytes())
        self._take("<Q")
        if len(table) != nlist:
            self._damaged(f"it has the places of {len(table):,} lists, and says {nlist:,}")
        # Where Faiss looks; or, after both were moved, beside the index.
        places = (Path(name), self.path.parent / Path(name).name)
        data = next((place for place in places if place.is_file()), None)
        if data is None:
            raise InputError(
                f"The lists of {self.path} are in {places[0]}, and there is no such file, nor {places[1]}.",
                remedy="Put the data file beside the index.",
            )
        return data, table

    def _array(self, kind: type[np.generic], width: int = 1) -> npt.NDArray[Any]:
        """As many numbers as the file says come now."""
        (count,) = self._take("<Q")
        length = count * width * np.dtype(kind).itemsize
        if self.handle.tell() + length > self.size:
            self._ends(length)
        return np.frombuffer(self.handle.read(length), np.dtype(kind).newbyteorder("<")).astype(kind)

    def _skip(self, width: int) -> None:
        (count,) = self._take("<Q")
        if self.handle.tell() + count * width > self.size:
            self._ends(count * width)
        self.handle.seek(count * width, os.SEEK_CUR)

    def _take(self, form: str) -> tuple[Any, ...]:
        data = self.handle.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            self._ends()
        return struct.unpack(form, data)

    def _ends(self, wanted: int | None = None) -> NoReturn:
        where = "its header goes on"
        if wanted is not None:
            where = f"{wanted:,} more bytes come at byte {self.handle.tell():,} of its header"
        raise InputError(
            f"{self.path} ends at byte {self.size:,}, and {where}.", remedy="Fetch it again; it is not whole."
        )

    def _damaged(self, why: str) -> NoReturn:
        raise InputError(f"{self.path} is damaged: {why}.", remedy="Fetch it again.")


def check_ids(file: FaissFile, advance: Advance) -> None:
    """Make sure that the ids are the numbers of rows: each of 0 to ntotal - 1 once. Takes a byte of memory per vector.

    Raises:
        InputError: an id is another number, or is there twice.
    """
    ntotal = file.ntotal
    seen = np.zeros(ntotal, np.bool_)
    wanted = f"and with {ntotal:,} vectors they must be the numbers of the passages, 0 to {ntotal - 1:,}, once each"
    remedy = "Add vectors in the order of the passages, without ids of their own."
    for number, first, ids in _ids(file):
        other = np.flatnonzero((ids < 0) | (ids >= ntotal))
        if len(other):
            raise InputError(
                f"List {number:,} of {file.path} holds the id {ids[other[0]]:,} in place {first + int(other[0]):,}, "
                f"{wanted}.",
                remedy=remedy,
            )
        twice = ids[seen[ids]]
        seen[ids] = True
        if not len(twice) and len(ids) > 1:
            ordered = np.sort(ids)
            twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise InputError(f"{file.path} holds the id {twice[0]:,} twice, {wanted}.", remedy=remedy)
        advance(len(ids))


def _ids(file: FaissFile) -> Iterator[tuple[int, int, IntArray]]:
    """List number, place of the first, and ids, some at a time."""
    with file.data.open("rb", buffering=0) as handle:
        for number, (size, capacity, offset) in enumerate(file.table.tolist()):
            begin = offset + capacity * file.code_size
            for first in range(0, size, CHECKED_IDS):
                count = min(CHECKED_IDS, size - first)
                data = read_exactly(handle.fileno(), count * ID_BYTES, begin + first * ID_BYTES, file.data)
                yield number, first, np.frombuffer(data, np.int64)


def copy_list(
    source: int, held: tuple[int, int, int], target: int, wanted: tuple[int, int, int], code_bytes: int, path: Path
) -> None:
    """Copy one list's codes and ids, a few MiB at a time, between descriptors; ``path`` is the source's, for messages.

    ``held`` is the list's size, capacity and byte offset in the source, ``wanted`` those of the place it gets.

    Raises:
        ArtifactError: the source ends before.
    """
    size = held[0]
    codes, ids = (held[2], wanted[2]), (held[2] + held[1] * code_bytes, wanted[2] + wanted[1] * code_bytes)
    for (begin, to), length in ((codes, size * code_bytes), (ids, size * ID_BYTES)):
        for done in range(0, length, CHUNK_BYTES):
            count = min(CHUNK_BYTES, length - done)
            write_at(target, read_exactly(source, count, begin + done, path), to + done)
