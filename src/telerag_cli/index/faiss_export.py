"""Faiss's file of an index folder: lists copied to where Faiss looks for them, after a header that Faiss itself writes."""

from __future__ import annotations

import os
from pathlib import Path

from telerag_cli.errors import ArtifactError
from telerag_cli.files import check_disk, sized, write_at, writing
from telerag_cli.index.artifact import ID_BYTES, Index
from telerag_cli.index.faiss_file import copy_list, lay_out_faiss
from telerag_cli.progress import Progress, silent


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
