"""Faiss's file of an index folder: lists copied to where Faiss looks for them, after a header that Faiss writes."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

import faiss

from telerag_cli.errors import ArtifactError
from telerag_cli.files import check_disk, sized, write_at, writing
from telerag_cli.index.artifact import ID_BYTES, Index
from telerag_cli.index.faiss_file import copy_list
from telerag_cli.index.scoring import empty_ivf, flat
from telerag_cli.progress import Progress, silent


def _header(index: Index) -> bytes:
    """What an ``IndexIVFFlat`` or ``IndexIVFScalarQuantizer`` with ``ArrayInvertedLists`` begins with.

    Faiss itself writes the header, of an index that has no lists yet; so it is what the installed version writes.

    Raises:
        ArtifactError: the installed Faiss writes headers otherwise.
    """
    manifest = index.manifest
    quantizer = flat(index.centroids, manifest.metric)
    ivf = empty_ivf(quantizer, manifest.dimension, manifest.nlist, manifest.metric, manifest.storage, index.trained)
    ivf.ntotal = manifest.ntotal
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
    about = struct.pack("<4sQQ4sQ", b"ilar", manifest.nlist, manifest.code_size, b"full", manifest.nlist)
    return written.removesuffix(b"il00") + about + index.sizes.astype("<u8").tobytes()


def export_index(index: Index, output: Path, *, overwrite: bool = False, progress: Progress = silent) -> int:
    """Write an ``IndexIVFFlat`` or ``IndexIVFScalarQuantizer`` whose ids are the row numbers of the passages.

    The file appears when it is whole. Returns the number of bytes written.

    Raises:
        ArtifactError: ``output`` is there already, or the lists end early.
        ResourceError: the disk is full or cannot be written.
    """
    if output.is_dir() or (output.exists() and not overwrite):
        remedy = "Choose another output." if output.is_dir() else "Choose another output or add --overwrite."
        raise ArtifactError(f"{output} exists.", remedy=remedy)
    header, code_bytes = _header(index), index.manifest.code_size
    entry_bytes = code_bytes + ID_BYTES
    total_bytes = len(header) + index.manifest.ntotal * entry_bytes
    check_disk(output, total_bytes, "Free space or choose another output.")
    with (
        progress("Copying lists", total_bytes, unit="bytes") as advance,
        writing(output) as temporary,
        index.held(index.paths.lists).open("rb", buffering=0) as source,
        sized(temporary, total_bytes) as target,
    ):
        write_at(target, header, 0)
        place = len(header)
        advance(place)
        for held in index.table.tolist():
            size = held[0]
            copy_list(source.fileno(), held, target, (size, size, place), code_bytes, index.paths.lists)
            place += size * entry_bytes
            advance(size * entry_bytes)
        os.fdatasync(target)
    return total_bytes
