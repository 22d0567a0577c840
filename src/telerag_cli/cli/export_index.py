"""``telerag export-index``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from telerag_cli.cli import console
from telerag_cli.cli.options import one
from telerag_cli.units import format_bytes


def export_index(
    index: Annotated[Path, one("index")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, which faiss.read_index reads.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write an index as one Faiss file, in bounded memory; its ids are the row numbers of the passages.

    Prints the file's path on stdout. Passages and kept vectors have no place in such a file and stay in the folder.
    """
    with console.stdout_reserved():
        from telerag_cli.index.artifact import Index
        from telerag_cli.index.faiss_export import export_index as run

        opened = Index.open(index)
        written = run(opened, output, overwrite=overwrite, progress=console.progress)
        manifest = opened.manifest
        console.say(
            f"{manifest.ntotal:,} vectors in {manifest.nlist:,} lists of {manifest.storage}, {manifest.metric}: "
            f"{format_bytes(written)} in {output}."
        )
    console.emit(str(output))
