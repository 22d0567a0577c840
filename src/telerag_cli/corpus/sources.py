"""Finding the files of a corpus: what is read, how, and what is left out of a folder."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import IO, cast

from telerag_cli import text
from telerag_cli.corpus.notes import CorpusNotes
from telerag_cli.errors import InputError, UsageError
from telerag_cli.files import wrap_os_error

STDIN = "-"
SNIFFED_BYTES = 64 << 10
ARTIFACTS = {"embeddings.json": "embeddings", "manifest.json": "an index", "build.json": "an index"}
"""Files that mark a folder as one of telerag's own, if they name their format."""


class SourceKind(Enum):
    """How a source is read."""

    JSON = auto()
    """A line, or an element of one array, is a row."""
    CSV = auto()
    TSV = auto()
    PARQUET = auto()
    TEXT = auto()
    MARKDOWN = auto()


KINDS = {
    ".jsonl": SourceKind.JSON,
    ".ndjson": SourceKind.JSON,
    ".json": SourceKind.JSON,
    ".csv": SourceKind.CSV,
    ".tsv": SourceKind.TSV,
    ".parquet": SourceKind.PARQUET,
    ".txt": SourceKind.TEXT,
    ".md": SourceKind.MARKDOWN,
}
COMPRESSED = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File}


@dataclass(frozen=True)
class Source:
    """One file, or standard input; ``label`` names it in ids and messages wherever it lies."""

    path: Path | None
    kind: SourceKind
    label: str

    def open(self) -> IO[bytes]:
        """Open it, decompressed."""
        if self.path is None:
            return sys.stdin.buffer
        opener = COMPRESSED.get(self.path.suffix.lower())
        return cast("IO[bytes]", opener(self.path)) if opener else self.path.open("rb")


@dataclass(frozen=True)
class Sources:
    """The files of a corpus in order, and the notes that finding them began."""

    name: str
    """What the user named, for messages."""
    files: tuple[Source, ...]
    notes: CorpusNotes = field(default_factory=CorpusNotes)


def find_sources(arguments: Sequence[str], output: Path | None = None) -> Sources:
    """Find the files that the arguments name; folders are walked in sorted order, linked ones too.

    Of a folder are left out, and counted: hidden files, kinds that are not read, ``output``, and whatever else telerag
    has written there (embeddings, indexes, answers of a run).

    Raises:
        InputError: paths do not exist, are of no kind that is read, or are folders with nothing to read; all of them
            are named.
        UsageError: standard input is named twice.
    """
    if list(arguments).count(STDIN) > 1:
        raise UsageError("Standard input (-) is named twice.", remedy="Name it once.")
    notes, found, troubles = CorpusNotes(), list[tuple[Source, str]](), list[InputError]()
    for argument in arguments:
        try:
            found += _named(argument, output, notes)
        except InputError as error:
            troubles.append(error)
    if len(troubles) == 1:
        raise troubles[0]
    if troubles:
        raise InputError(
            f"{len(troubles)} of {len(arguments)} sources cannot be used: "
            + " ".join(error.message for error in troubles),
            remedy="Correct them, or name the others only.",
        )
    uses = Counter(source.label for source, _ in found)
    return Sources(
        text.of_path(", ".join(arguments)),
        tuple(source if uses[source.label] == 1 else Source(source.path, source.kind, full) for source, full in found),
        notes,
    )


def _named(argument: str, output: Path | None, notes: CorpusNotes) -> Iterator[tuple[Source, str]]:
    """Yield each source that an argument stands for, with the full name that tells it from others of its label."""
    if argument == STDIN:
        yield Source(None, SourceKind.JSON, "<stdin>"), "<stdin>"
        return
    root, shown = Path(argument), text.of_path(argument)
    if not root.exists():
        raise InputError(f"{shown} does not exist.", remedy="Check the path.")
    if root.is_dir():
        members = list(_walk(root, output, notes))
        if not members:
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in notes.files.most_common())
            raise InputError(
                f"{shown} holds nothing of a kind that is read ({', '.join(KINDS)})"
                f"{f', and {kinds} that is not' * bool(kinds)}.",
                remedy="Name the folder that holds the corpus.",
            )
        for path, kind in members:
            yield Source(path, kind, text.of_path(path.relative_to(root))), text.of_path(path)
        return
    # A pipe such as <(zcat corpus.gz) has no name to judge by.
    known = kind_of(root) if root.is_file() else SourceKind.JSON
    if known is None:
        raise InputError(
            f"{shown} is not of a kind that is read ({', '.join(KINDS)}; text ones also as {', '.join(COMPRESSED)}).",
            remedy="Rename it, or pipe it as JSONL into '-'.",
        )
    yield Source(root, known, text.of_path(root.name)), shown


def _walk(root: Path, output: Path | None, notes: CorpusNotes) -> Iterator[tuple[Path, SourceKind]]:
    """Yield the files of a folder that are read, sorted by the parts of their names; links that lead in circles end."""
    written = output.resolve() if output else None
    found: list[tuple[Path, SourceKind]] = []
    seen: set[tuple[int, int]] = set()

    def refused(error: OSError) -> None:
        raise wrap_os_error(error, Path(error.filename or root))

    for place, folders, names in os.walk(root, followlinks=True, onerror=refused):
        folder = Path(place)
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if folder != root and (what := _artifact(folder, written)):
            notes.files[what] += 1
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = folder / name
            if name.startswith(".") or not path.is_file():
                continue
            kind = kind_of(path)
            if kind is SourceKind.JSON and (reason := _not_rows(path)):
                notes.files[reason] += 1
            elif kind is None:
                notes.files[path.suffix.lower() or "no suffix"] += 1
            else:
                found.append((path, kind))
    yield from sorted(found, key=lambda each: each[0].parts)


def kind_of(path: Path) -> SourceKind | None:
    """Return how a file is read, by its name, or None if it is not."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        kind = KINDS.get(suffixes[0]) if len(suffixes) > 1 else None
        return None if kind is SourceKind.PARQUET else kind
    return KINDS.get(suffixes[-1]) if suffixes else None


def _artifact(folder: Path, output: Path | None) -> str | None:
    """Return what of telerag's own a folder is, or None."""
    if output and folder.resolve() == output:
        return "the output"
    for name, what in ARTIFACTS.items():
        try:
            with (folder / name).open("rb") as handle:
                if b'"telerag-' in handle.read(SNIFFED_BYTES):
                    return what
        except OSError:
            continue
    return None


def _not_rows(path: Path) -> str | None:
    """Return why a JSON file found in a folder is not a corpus, or None: a run's answers, or a single object."""
    try:
        with Source(path, SourceKind.JSON, "").open() as handle:
            sniffed = io.BytesIO(handle.read(SNIFFED_BYTES))
        with text.reading(sniffed) as (reader, _encoding):
            start = reader.read().lstrip()
    except (OSError, EOFError, UnicodeError):
        return None  # reading says what is wrong
    first, _, rest = start.partition("\n")
    try:
        row = text.parse_json(first)
    except text.TextError:
        row = None
    keys = set(row) if isinstance(row, dict) else set()
    is_lines = bool(keys) and (bool(rest.strip()) or "text" in keys)
    if path.suffixes[:1] == [".json"] and not start.startswith("[") and not is_lines:
        return ".json of one object"
    is_run = keys >= {"answer", "passages", "timings"} or keys >= {"custom_id", "response"}
    return "answers of a run" if is_run else None
