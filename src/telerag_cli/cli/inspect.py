"""``telerag inspect``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from telerag_cli.cli import console
from telerag_cli.cli.build_index import COLUMNS, index_rows
from telerag_cli.errors import ArtifactError
from telerag_cli.units import format_bytes

SHOWN = 20
"""Damaged parts named in a message."""

Report = tuple[str, dict[str, Any], list[tuple[str, str]], list[str]]
"""Kind, JSON fields, table rows, and damaged parts."""


def inspect(
    path: Annotated[Path, typer.Argument(help="An index, an embeddings folder, or Parquet with a vector column.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare checksums.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    column: Annotated[str | None, typer.Option(help="The vector column, if there are several.")] = None,
) -> None:
    """Say what an index or an embeddings folder is, and check it."""
    if not path.exists():
        raise ArtifactError(f"{path} does not exist.", remedy="Check the path.")
    if (path / "work" / "build.json").exists():
        raise ArtifactError(f"{path} is an unfinished build.", remedy="Run the same command again; it resumes.")
    if (path / "manifest.json").exists() or (path / "lists.bin").exists():
        kind, about, rows, damage = _index(path, verify)
    else:
        kind, about, rows, damage = _embeddings(path, column, verify)
    verified = "every byte is as it was written" if verify else "not asked for"
    if damage:
        verified = f"damaged: {'; '.join(damage)}"
    if as_json:
        console.emit_json({"path": str(path), "kind": kind, **about, "verified": verify, "damage": damage}, indent=2)
    else:
        rows = [("kind", kind), *rows, ("verified", verified)]
        console.table(str(path), COLUMNS, rows, data=True)
    if damage:
        raise ArtifactError(f"{path} is damaged: {'; '.join(damage)}.", remedy="Restore it or make it again.")


def _index(path: Path, wanted: bool) -> Report:
    from telerag_cli.index.artifact import Index
    from telerag_cli.index.verify import verify

    index = Index.open(path)
    damage = []
    if wanted:
        total = sum(info.bytes for info in index.manifest.files.values())
        with console.progress("Reading", total, unit="bytes") as advance:
            found = verify(index, advance)
        damage = [f"{name} does not match its checksum" for name in found.files]
        if found.lists:
            damage.append(f"{len(found.lists)} of {index.manifest.nlist} lists: {_some(found.lists)}")
    return "telerag index", asdict(index.manifest), index_rows(index.manifest), damage


def _embeddings(path: Path, column: str | None, wanted: bool) -> Report:
    from telerag_cli.corpus.embeddings import READ_ROWS, Embeddings, damaged_shards
    from telerag_cli.errors import TeleragError

    source = Embeddings.open(path, column)
    told = source.description
    kind = "telerag embeddings" if told else "Parquet with vectors"
    about = {
        "rows": source.rows,
        "dimension": source.dimension,
        "dtype": source.dtype,
        "column": source.column,
        "bytes": source.bytes,
        "shards": len(source.shards),
        "description": told,
    }
    rows = [
        ("vectors", f"{source.rows:,} of {source.dimension} dimensions, {source.dtype}, column '{source.column}'"),
        ("bytes", f"{format_bytes(source.bytes)} in {len(source.shards):,} files"),
    ]
    rows += [
        (name, str(told[name])) for name in ("model", "pooling", "normalized", "prompt", "max_tokens") if name in told
    ]
    damage: list[str] = []
    if wanted and told:
        with console.progress("Reading", source.bytes, unit="bytes") as advance:
            names = damaged_shards(source, advance)
        damage = [f"{len(names)} of {len(source.shards)} shards: {_some(names)}"] if names else []
    elif wanted:
        # No checksums but Parquet's own, if it has them: read all of it.
        try:
            with console.progress("Reading", source.rows, unit="vectors") as advance:
                for _, block in source.batches(READ_ROWS):
                    advance(len(block))
        except TeleragError as error:
            damage = [error.message.rstrip(".")]
    return kind, about, rows, damage


def _some(parts: tuple[object, ...] | list[str]) -> str:
    more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return ", ".join(str(part) for part in parts[:SHOWN]) + more
