"""``telerag data``: public datasets, fetched and turned into what the other commands read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telerag_cli.cli import console
from telerag_cli.cli.guard import guarded
from telerag_cli.errors import ArtifactError, UsageError
from telerag_cli.units import format_bytes

if TYPE_CHECKING:
    from telerag_cli.datasets.cache import Cached
    from telerag_cli.datasets.catalogue import Dataset

SHOWN_BAD = 3
"""Entries that could not be used, named in a warning."""


app = typer.Typer(
    name="data",
    no_args_is_help=True,
    help="Public datasets: fetch them, check them, and prepare them for the other commands.",
)

NamesArgument = Annotated[
    list[str], typer.Argument(help="Datasets by name, or TOML files that describe others.", metavar="NAME")
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Where datasets are kept, a folder each.  \\[default: telerag/datasets in the user's cache]"
    ),
]


def list_datasets(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Only these, by name or as TOML files that describe others.", metavar="NAME"),
    ] = None,
    cache_dir: CacheDirOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the datasets, their licences and sizes, and what of them is here."""
    from telerag_cli.datasets import catalogue

    found = _described(names or catalogue.names(), cache_dir)
    if as_json:
        console.emit_json([_as_json(cached) for cached in found], indent=2)
        return
    rows = [
        (each.dataset.name, each.dataset.what, each.dataset.licence, _size(each.dataset), each.state())
        for each in found
    ]
    console.table("", ("name", "what", "licence", "size", "state"), rows, data=True)


def fetch(
    names: NamesArgument,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Fetch only what this split needs: train, dev or test.  \\[default: all files]"
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="ADDRESS|PATH",
            help="Take one dataset from here: an address of a file or of its folder, or a local file or folder.",
        ),
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS|DIR",
            help="Take datasets from here instead of their publishers: each lies below in a folder of its name.",
        ),
    ] = None,
    cache_dir: CacheDirOption = None,
) -> None:
    """Fetch datasets into the cache; what was interrupted continues where it stopped. Prints the files."""
    _one_at_a_time(names, "--from", source)
    from telerag_cli.datasets.fetch import fetch_files

    chosen = [(cached, cached.dataset.files_of(split)) for cached in _described(names, cache_dir)]
    for cached, files in chosen:
        console.say(f"{cached.dataset.name}: {cached.dataset.title}; licence: {cached.dataset.licence}.")
        got = fetch_files(cached, files, source, mirror, progress=console.progress, notice=console.warn)
        for file, fetched in got:
            known = cached.sources()[file.name]
            size = format_bytes(known.bytes)
            if not fetched:
                console.say(f"{file.name} is there already ({size}, fetched {known.date}).")
            elif file.sha256 or file.md5:
                console.say(f"Fetched {file.name}: {size}, and its checksum is the published one.")
            else:
                console.say(f"Fetched {file.name}: {size}; no checksum is published, its sha256 is {known.sha256}.")
            console.emit(str(cached.path(file)))


def prepare(
    names: NamesArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for the files.  \\[default: beside what was fetched, where the dataset's name finds them]",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Whose questions: train, dev or test.  \\[default: the one that is customary for the dataset]",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="The first questions only, or the first passages of a dataset without questions."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out entries that cannot be used, and count them.")
    ] = False,
    cache_dir: CacheDirOption = None,
) -> None:
    """Turn what was fetched into corpus.jsonl, questions.jsonl and qrels.tsv. Prints their folder."""
    _one_at_a_time(names, "--output", output)
    for cached in _described(names, cache_dir):
        _prepare(cached, split, limit, output, skip_bad)


def check(
    names: NamesArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Where it was prepared.  \\[default: beside what was fetched]"
        ),
    ] = None,
    cache_dir: CacheDirOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Read all that was fetched and prepared, and compare it with what it should be."""
    _one_at_a_time(names, "--output", output)
    from telerag_cli.datasets.prepare import bytes_to_check
    from telerag_cli.datasets.prepare import check as check_files

    found = []
    for cached in _described(names, cache_dir):
        folder = output or cached.prepared
        total = bytes_to_check(cached, folder)
        with console.progress(f"Reading {cached.dataset.name}", total, unit="bytes") as advance:
            found += [(cached.dataset.name, each) for each in check_files(cached, folder, advance)]
    if as_json:
        console.emit_json([{"dataset": name, "file": each.file, "says": each.says} for name, each in found], indent=2)
    else:
        rows = [(name, each.file, each.says) for name, each in found]
        console.table("", ("dataset", "file", "found"), rows, data=True)
    wrong = [f"{name}: {each.file} {each.says}" for name, each in found if each.wrong]
    if wrong:
        raise ArtifactError(f"{'; '.join(wrong)}.", remedy="Remove what is wrong, and fetch or prepare it again.")


app.command("list")(guarded(list_datasets))
for command in (fetch, prepare, check):
    app.command()(guarded(command))


def _described(names: list[str], cache_dir: Path | None) -> list[Cached]:
    from telerag_cli.datasets.cache import Cached
    from telerag_cli.datasets.catalogue import describe

    return [Cached.of(describe(name), cache_dir) for name in names]


def _one_at_a_time(names: list[str], flag: str, given: object) -> None:
    if given is not None and len(names) > 1:
        raise UsageError(f"{flag} is for one dataset, and {len(names)} are named.", remedy="Give them one at a time.")


def _as_json(cached: Cached) -> dict[str, Any]:
    dataset = cached.dataset
    return {
        "name": dataset.name,
        "title": dataset.title,
        "what": dataset.what,
        "homepage": dataset.homepage,
        "licence": dataset.licence,
        "kind": dataset.kind,
        "split": dataset.split,
        "splits": dataset.splits,
        "bytes": dataset.size,
        "exact": all(file.bytes is not None for file in dataset.files),
        "unknown": dataset.unknown,
        "files": [file.address for file in dataset.files],
        "folder": str(cached.root),
        "state": cached.state(),
    }


def _size(dataset: Dataset) -> str:
    if dataset.size is None:
        return "unknown"
    rounded = any(file.bytes is None for file in dataset.files)
    return f"{'about ' if rounded else ''}{format_bytes(dataset.size)}"


def _prepare(cached: Cached, split: str | None, limit: int | None, output: Path | None, skip_bad: bool) -> None:
    from telerag_cli.datasets.prepare import prepare, unprepared

    if limit is None and output is None and (file := unprepared(cached)):
        console.say(
            f"Nothing to prepare: telerag embed reads {file.name} as it is. With -o, it is written as JSON lines."
        )
        console.emit(str(file))
        return
    bad: list[str] = []
    folder = output or cached.prepared
    try:
        with console.progress(f"Preparing {cached.dataset.name}", None, unit="entries") as advance:
            on_bad = (lambda error: bad.append(error.message.rstrip("."))) if skip_bad else None
            made = prepare(cached, split, limit, folder, advance, on_bad)
    finally:
        if bad:
            more = " ..." * (len(bad) > SHOWN_BAD)
            console.warn(f"bad entries left out: {len(bad):,}: {'; '.join(bad[:SHOWN_BAD])}{more}")
    if empty := made.left_out - len(bad):
        console.say(f"Passages without text left out: {empty:,}.")
    counts = ", ".join(f"{file.rows:,} in {name}" for name, file in made.files.items())
    console.say(f"Prepared {cached.dataset.name}{f', {made.split}' if made.split else ''}: {counts}.")
    console.emit(str(folder))
