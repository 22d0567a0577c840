"""``telerag embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from telerag_cli.build_config import EmbedConfig
from telerag_cli.cli import console
from telerag_cli.cli.ray_options import RayOptions
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
    *,
    config: EmbedConfig,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out lines and files that cannot be used, and count them.")
    ] = False,
    ray: RayOptions,
) -> None:
    """Embed a corpus into a folder of Parquet shards; a killed run resumes."""
    from telerag_cli.corpus.sources import find_sources

    found = find_sources(sources, output)  # what is missing is said before the seconds that loading libraries takes
    if ray.used and ":" in config.device:
        raise UsageError(
            f"--device is {config.device}, and Ray gives each worker a GPU.", remedy="Use --device cuda, auto or cpu."
        )
    from telerag_cli.embedding.job import embed as run

    try:
        with ray.pool(gpus=config.device != "cpu") as pool:
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
