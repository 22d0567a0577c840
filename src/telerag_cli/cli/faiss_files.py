"""``telerag import-index`` and ``telerag export-index``: indexes as files of Faiss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from telerag_cli.cli import console
from telerag_cli.cli.build_index import COLUMNS, index_rows
from telerag_cli.cli.options import one
from telerag_cli.files import free_bytes
from telerag_cli.units import format_bytes

if TYPE_CHECKING:
    from telerag_cli.index.faiss_import import ImportPlan


def import_index(
    index: Annotated[
        Path,
        typer.Argument(
            help="A file made by faiss.write_index: IndexIVFFlat, or IndexIVFScalarQuantizer of fp16 or 8bit without "
            "residuals.",
            metavar="FAISS",
        ),
    ],
    passages: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="JSONL, TSV, CSV or Parquet files, or folders of them: passage number i is that of Faiss's id i. "
            "Give it again for further files.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Index folder to make.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="The model that made the vectors, which then embeds questions.  \\[default: not recorded]",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index, or an import begun otherwise.")
    ] = False,
) -> None:
    """Make an index folder of a Faiss index and its passages, in bounded memory; an interrupted import resumes.

    Prints the folder's path on stdout; sizes and list balance on stderr.
    """
    from telerag_cli.corpus.sources import find_sources

    sources = find_sources(passages)
    with console.stdout_reserved():
        from telerag_cli.index.faiss_file import read_faiss
        from telerag_cli.index.faiss_import import import_index as run
        from telerag_cli.index.faiss_import import plan_import

        plan = plan_import(read_faiss(index), sources, output, model)
        if plan.finished(overwrite=overwrite):
            console.say(f"{output} is already imported from these files with these options.")
        else:
            _show_plan(plan)
        made = run(plan, overwrite=overwrite, progress=console.progress)
        console.table("", COLUMNS, index_rows(made.manifest))
        if model is None:
            console.say("Which model made the vectors is not recorded; name it with --embedder when you search.")
    console.emit(str(output))


def _show_plan(plan: ImportPlan) -> None:
    file = plan.file
    rows = [
        ("lists", "disk", format_bytes(plan.lists_bytes)),
        ("passages (estimate)", "disk", format_bytes(plan.passages_bytes)),
        ("centroids", "memory and disk", format_bytes(file.centroids.nbytes)),
        ("ids to check", "memory", format_bytes(file.ntotal)),
    ]
    vectors = f"{file.ntotal:,} vectors of {file.dimension} dimensions"
    title = f"{vectors} in {file.nlist:,} lists of {file.storage}, {file.metric}"
    console.table(title, ["what", "where", "bytes"], rows)
    resumed = (
        f" An import of the same was begun and goes on; {format_bytes(plan.left_bytes)} are there."
        if plan.begun
        else ""
    )
    console.say(f"Free: {format_bytes(free_bytes(plan.root))} of disk.{resumed}")


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
