"""Turning fetched files into ``corpus.jsonl``, ``questions.jsonl`` and ``qrels.tsv``, and checking both later."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from telerag_cli.datasets.cache import CORPUS, QRELS, QUESTIONS, Cached, PreparedFile, PreparedManifest
from telerag_cli.datasets.catalogue import DatasetKind, Parser, RemoteFile
from telerag_cli.datasets.fetch import checksums, mismatch
from telerag_cli.datasets.parsers import QRELS_HEADER, DatasetReader
from telerag_cli.errors import ArtifactError, TeleragError
from telerag_cli.files import checksum, exclusive, wrap_os_error, writing
from telerag_cli.progress import Advance


def unprepared(cached: Cached) -> Path | None:
    """Return the file that ``telerag embed`` reads as its publisher has it, if the dataset is one.

    Raises:
        ArtifactError: it has not been fetched.
    """
    if cached.dataset.parser is not Parser.DPR_PASSAGES:
        return None
    _need(cached, cached.dataset.files, None)
    return cached.path(cached.dataset.files[0])


def prepare(
    cached: Cached,
    split: str | None,
    limit: int | None,
    folder: Path,
    advance: Advance,
    on_bad: Callable[[TeleragError], None] | None = None,
) -> PreparedManifest:
    """Write the files, and in ``prepared.json`` what they were made from; what was there is replaced at the end.

    Without a ``split`` it is the description's own. ``limit`` leaves the first questions only, or the first passages of
    a dataset that has no questions. ``on_bad`` is called with the error of each entry that cannot be used; without it
    the first one is raised.

    Raises:
        ArtifactError: a file has not been fetched.
        ResourceError: the disk is full, or another process prepares into the folder.
        UsageError: there is no such split.
    """
    dataset, split = cached.dataset, split or cached.dataset.split
    files = dataset.files_of(split)
    _need(cached, files, split)
    bad = 0

    def count_bad(error: TeleragError) -> None:
        nonlocal bad
        bad += 1
        if on_bad is None:
            raise error
        on_bad(error)

    source = DatasetReader(cached, split, count_bad)
    made = _lines_of(source, dataset.kind, limit)
    rows: dict[str, int] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise wrap_os_error(error, folder) from error
    with exclusive(folder):
        with contextlib.ExitStack() as stack:  # the files get their names together
            for name, lines in made.items():
                temporary = stack.enter_context(writing(folder / name))
                rows[name] = _write(temporary, folder / name, lines, advance) - (name == QRELS)  # without the header
        known = cached.sources()
        manifest = PreparedManifest(
            dataset.name,
            split,
            limit,
            {file.name: known[file.name].sha256 for file in files},
            {
                name: PreparedFile(count, (folder / name).stat().st_size, checksum(folder / name))
                for name, count in rows.items()
            },
            bad + source.empty,
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        manifest.save(folder)
    return manifest


def _lines_of(source: DatasetReader, kind: DatasetKind, limit: int | None) -> dict[str, Iterator[str]]:
    """Return the lines of each file, to be read in this order: judgements are of the questions before them."""
    kept: set[str] = set()

    def corpus() -> Iterator[str]:
        for passage in islice(source.passages(), limit if kind is DatasetKind.PASSAGES else None):
            rest = {key: value for key, value in passage.metadata.items() if key != "title"}
            row = {"_id": passage.id, "title": passage.metadata.get("title", ""), "text": passage.text}
            yield json.dumps(row | ({"metadata": rest} if rest else {}), ensure_ascii=False)

    def questions() -> Iterator[str]:
        for question in islice(source.questions(), limit):
            kept.add(question.id)
            row = {"id": question.id, "question": question.question, "answers": list(question.answers)}
            yield json.dumps(row, ensure_ascii=False)

    def qrels() -> Iterator[str]:
        yield "\t".join(QRELS_HEADER)
        for question, passage, score in source.judgements():
            if question in kept:
                yield f"{question}\t{passage}\t{score}"

    files = {CORPUS: corpus(), QUESTIONS: questions(), QRELS: qrels()}
    wanted = {DatasetKind.PASSAGES: [CORPUS], DatasetKind.QUESTIONS: [QUESTIONS], DatasetKind.BOTH: list(files)}[kind]
    return {name: files[name] for name in wanted}


def _need(cached: Cached, files: tuple[RemoteFile, ...], split: str | None) -> None:
    for file in files:
        if not cached.has(file):
            raise ArtifactError(
                f"{file.name} of {cached.dataset.name} is not in {cached.root}, or is incomplete.",
                remedy=f"Run {cached.fetch_command(split)}.",
            )


def _write(temporary: Path, path: Path, lines: Iterator[str], advance: Advance) -> int:
    count = 0
    with temporary.open("w", encoding="utf-8", newline="\n") as handle:
        for line in lines:
            try:
                handle.write(line + "\n")
            except OSError as error:  # a full disk is not a fault of the file that is read
                raise wrap_os_error(error, path) from error
            count += 1
            advance(1)
    return count


@dataclass(frozen=True)
class FileFinding:
    """What was found of one file, in words, with both values if something is wrong."""

    file: str
    says: str
    wrong: bool = False


def bytes_to_check(cached: Cached, folder: Path) -> int:
    """Return how much `check` will read, for a progress bar."""
    manifest = PreparedManifest.load(folder)
    prepared = [folder / name for name in manifest.files] if manifest else []
    paths = [*(cached.path(file) for file in cached.dataset.files), *prepared]
    return sum(path.stat().st_size for path in paths if path.is_file())


def check(cached: Cached, folder: Path, advance: Advance) -> Iterator[FileFinding]:
    """Read everything and compare it with the description, ``source.json`` and ``prepared.json``.

    Raises:
        ArtifactError: ``source.json`` or ``prepared.json`` is damaged.
        ResourceError: a file cannot be read.
    """
    known, manifest = cached.sources(), PreparedManifest.load(folder)
    none = not any(cached.path(file).exists() for file in cached.dataset.files)
    try:
        for file in cached.dataset.files:
            yield FileFinding(file.name, *_fetched(cached, file, none, advance))
        if manifest is None:
            return
        if manifest.dataset != cached.dataset.name:
            says = f"was prepared from {manifest.dataset}, and not from {cached.dataset.name}"
            yield FileFinding(str(folder), says, True)
            return
        for name, made in manifest.files.items():
            yield FileFinding(str(folder / name), *_prepared(folder / name, made))
            advance(made.bytes)
    except OSError as error:
        raise wrap_os_error(error, Path(error.filename or folder)) from error
    for name, digest in manifest.sources.items():
        if name in known and known[name].sha256 != digest:
            says = f"was made from {name} with sha256 {digest}, and that of {known[name].sha256} is there now"
            yield FileFinding(str(folder), says, True)


def _fetched(cached: Cached, file: RemoteFile, none: bool, advance: Advance) -> tuple[str, bool]:
    path, known = cached.path(file), cached.sources().get(file.name)
    if not path.exists():
        have, begun = cached.begun(file)
        if have:
            total = f" of {begun.bytes:,}" if begun and begun.bytes else ""
            return f"only {have:,}{total} bytes have arrived", True
        return "is noted in source.json, and missing" if known else "has not been fetched", none or known is not None
    if known is None:
        return "is there, and source.json does not know of it", True
    size, sums = path.stat().st_size, checksums(path, advance)
    if wrong := mismatch(file, size, sums):
        return wrong, True
    if size != known.bytes:
        return f"has {size:,} bytes, and {known.bytes:,} were fetched", True
    if sums["sha256"] != known.sha256:
        return f"its sha256 is {sums['sha256']}, and was {known.sha256} when it was fetched", True
    published = file.sha256 or file.md5
    what = "the publisher's checksum" if published else "what was fetched; its publisher gives no checksum"
    return f"agrees with {what}", False


def _prepared(path: Path, made: PreparedFile) -> tuple[str, bool]:
    if not path.is_file():
        return "is missing", True
    size, found = path.stat().st_size, checksum(path)
    if size != made.bytes:
        return f"has {size:,} bytes, and {made.bytes:,} were written", True
    if found != made.checksum:
        return f"its checksum is {found}, and was {made.checksum} when it was written", True
    return f"complete, {made.rows:,} entries", False
