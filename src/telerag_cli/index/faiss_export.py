"""Faiss's file of an index folder: lists copied to where Faiss looks for them, after a header that Faiss writes."""

from __future__ import annotations

import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from telerag_cli.arrays import FloatArray, IntArray, TableArray
from telerag_cli.config import Metric, Storage
from telerag_cli.errors import ArtifactError
from telerag_cli.files import check_disk, sized, write_at, writing
from telerag_cli.index.artifact import ID_BYTES, Index, code_size
from telerag_cli.index.faiss_file import copy_list
from telerag_cli.index.scoring import empty_ivf, flat
from telerag_cli.progress import Progress, silent


@dataclass(frozen=True)
class FaissLayout:
    """What a file that Faiss reads will hold: the bytes before the lists, and where each list goes."""

    header: bytes
    table: TableArray
    """As `FaissFile.table`; nothing is between the lists."""
    total_bytes: int


def lay_out_faiss(
    centroids: FloatArray, metric: Metric, storage: Storage, trained: FloatArray | None, sizes: IntArray
) -> FaissLayout:
    """Begin an ``IndexIVFFlat`` or ``IndexIVFScalarQuantizer`` with ``ArrayInvertedLists``.

    Faiss itself writes the header, of an index that has no lists yet; so it is what the installed version writes.

    Args:
        centroids: (nlist, dimension).
        metric: of index and quantizer.
        storage: how vectors are kept.
        trained: minima and ranges of ``int8``.
        sizes: vectors in each list, (nlist,).

    Raises:
        ArtifactError: the installed Faiss writes headers otherwise.
    """
    nlist, dimension = centroids.shape
    quantizer = flat(centroids, metric)
    ivf = empty_ivf(quantizer, dimension, nlist, metric, storage, trained)
    ivf.ntotal = int(sizes.sum())
    ivf.replace_invlists(None, False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.index"
        faiss.write_index(ivf, str(path))
        written = path.read_bytes()
    if not written.endswith(b"il00"):
        raise ArtifactError(
            f"Faiss {faiss.__version__} ends an index without lists with {written[-4:]!r}, and b'il00' was expected.",
            remedy="Export with another version of Faiss.",
        )
    code_bytes = code_size(dimension, storage)
    header = (
        written.removesuffix(b"il00")
        + b"ilar"
        + struct.pack("<QQ", nlist, code_bytes)
        + b"full"
        + struct.pack("<Q", nlist)
        + sizes.astype("<u8").tobytes()
    )
    ends = len(header) + np.cumsum(sizes * (code_bytes + ID_BYTES))
    offsets = np.concatenate([[len(header)], ends])
    return FaissLayout(header, np.stack([sizes, sizes, offsets[:-1]], axis=1).astype(np.uint64), int(offsets[-1]))


def export_index(index: Index, output: Path, *, overwrite: bool = False, progress: Progress = silent) -> int:
    """Write an ``IndexIVFFlat`` or ``IndexIVFScalarQuantizer`` whose ids are the row numbers of the passages.

    Args:
        index: the index.
        output: the file to write; it appears when it is whole.
        overwrite: replace what is there.
        progress: shows how far it is.

    Returns:
        Bytes written.

    Raises:
        ArtifactError: ``output`` is there already, or the lists end early.
        ResourceError: the disk is full or cannot be written.
    """
    if output.is_dir() or (output.exists() and not overwrite):
        remedy = "Choose another output." if output.is_dir() else "Choose another output or add --overwrite."
        raise ArtifactError(f"{output} exists.", remedy=remedy)
    manifest = index.manifest
    layout = lay_out_faiss(index.centroids, manifest.metric, manifest.storage, index.trained, index.sizes)
    check_disk(output, layout.total_bytes, "Free space or choose another output.")
    with (
        progress("Copying lists", layout.total_bytes, unit="bytes") as advance,
        writing(output) as temporary,
        index.paths.lists.open("rb", buffering=0) as source,
        sized(temporary, layout.total_bytes) as target,
    ):
        write_at(target, layout.header, 0)
        advance(len(layout.header))
        for held, wanted in zip(index.table.tolist(), layout.table.tolist(), strict=True):
            copy_list(source.fileno(), held, target, wanted, manifest.code_size, index.paths.lists)
            advance(held[0] * (manifest.code_size + ID_BYTES))
        os.fdatasync(target)
    return layout.total_bytes
