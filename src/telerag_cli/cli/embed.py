"""``telerag embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from telerag_cli.cli import console
from telerag_cli.cli.ray_options import RayAddressOption, RayOption, WorkersOption, ray_pool
from telerag_cli.config import DEFAULT_EMBEDDER
from telerag_cli.errors import UsageError


def embed(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="JSON lines, TSV, CSV, Parquet, .txt or .md files, folders of them, or - for JSON lines on stdin.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the embeddings; a begun one is resumed.")],
    model: Annotated[
        str, typer.Option(help="A sentence-transformers folder, or a name in the Hugging Face cache or hub.")
    ] = DEFAULT_EMBEDDER,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Type of the stored vectors.")] = "float32",
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type to compute in; auto is bfloat16 where it is fast and keeps a cosine of 0.999."),
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Passages in a batch, fewer if longer than 64 tokens; default 32, on a GPU 1024."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    shard_rows: Annotated[int, typer.Option(min=1, help="Passages in a shard, which is the unit of resuming.")] = 8192,
    limit: Annotated[int | None, typer.Option(min=1, help="Embed the first passages only.")] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of texts.  \\[default: text, contents, page_content, body, ...]")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of ids.  \\[default: id, _id, docid, ..., else file and line]")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out lines and files that cannot be used, and count them.")
    ] = False,
    ray: RayOption = False,
    ray_address: RayAddressOption = None,
    workers: WorkersOption = None,
) -> None:
    """Embed a corpus into a folder of Parquet shards; a killed run resumes."""
    from telerag_cli.corpus.sources import find_sources

    found = find_sources(sources, output)  # what is missing is said before the seconds that loading libraries takes
    remote = ray or ray_address is not None
    if remote and ":" in device:
        raise UsageError(
            f"--device is {device}, and Ray gives each worker a GPU.", remedy="Use --device cuda, auto or cpu."
        )
    from telerag_cli.embedding.job import EmbedConfig
    from telerag_cli.embedding.job import embed as run

    config = EmbedConfig(model, device, precision, dtype, batch_size, shard_rows, limit, text_column, id_column)
    try:
        with ray_pool(ray, ray_address, workers, gpus=device != "cpu") as pool:
            on_bad = (lambda _error: None) if skip_bad else None
            report = run(found, output, config, pool=pool, progress=console.progress, on_bad=on_bad)
    finally:
        for line in found.notes.lines():
            console.say(line)
    place = f"{report.rows:,} passages in {report.shards:,} shard{'s' * (report.shards != 1)} in {output}"
    if report.embedded:
        kept = report.rows - report.embedded
        computed_on = f"{pool.workers:,} worker{'s' * (pool.workers != 1)}" if pool else report.device
        speed = f"{report.embedded / report.seconds:,.1f} passages/s, {report.precision} on {computed_on}"
        console.say(
            f"Embedded {report.embedded:,} passages in {report.seconds:.1f} s ({speed})"
            f"{f', kept {kept:,} from before' * bool(kept)}: {place}."
        )
    else:
        console.say(f"Already complete: {place}.")
    console.emit(str(output))
