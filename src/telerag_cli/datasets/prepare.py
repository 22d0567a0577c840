"""Turning fetched files into what the other commands take: ``corpus.jsonl``, ``questions.jsonl`` and ``qrels.tsv``."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from telerag_cli.corpus.passages import Passage
from telerag_cli.datasets.cache import CORPUS, QRELS, QUESTIONS, Cached, Manifest, PreparedFile
from telerag_cli.datasets.catalogue import Kind, Parser, RemoteFile
from telerag_cli.datasets.parsers import QRELS_HEADER, AnsweredQuestion, Judgement, OnBad, Opened
from telerag_cli.errors import ArtifactError, InputError
from telerag_cli.files import checksum, wrap_os_error, writing
from telerag_cli.progress import Advance


@dataclass(frozen=True)
class Wanted:
    """What is to be prepared."""

    split: str | None = None
    """None for the description's own."""
    limit: int | None = None
    """The first questions only, or the first passages of a dataset that has no questions."""


def as_it_is(cached: Cached) -> Path | None:
    """The file, if ``telerag embed`` reads it as its publisher has it.

    Raises:
        ArtifactError: it has not been fetched.
    """
    if cached.dataset.parser is not Parser.DPR_PASSAGES:
        return None
    _need(cached, cached.dataset.files, None)
    return cached.path(cached.dataset.files[0])


def prepare(cached: Cached, wanted: Wanted, folder: Path, advance: Advance, on_bad: OnBad | None = None) -> Manifest:
    """Write the files and say in ``prepared.json`` of what they were made; what was there before is replaced at the end.

    Args:
        cached: the dataset's folder, with what the split needs.
        wanted: the split, and how much of it.
        folder: for the files; made if it is missing.
        advance: told of each row that was written.
        on_bad: called with the error of each entry that cannot be used; without it the first one is raised.

    Returns:
        What was made.

    Raises:
        ArtifactError: a file has not been fetched.
        InputError: a file is damaged, or an entry cannot be used.
        ResourceError: the disk is full.
        UsageError: there is no such split.
    """
    dataset = cached.dataset
    split = wanted.split or dataset.split
    files = dataset.files_of(split)
    _need(cached, files, split)
    left_out = 0

    def counting(error: InputError) -> None:
        nonlocal left_out
        left_out += 1
        assert on_bad is not None
        on_bad(error)

    source = Opened(cached, split, counting if on_bad else None)
    rows: dict[str, int] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise wrap_os_error(error, folder) from error
    with contextlib.ExitStack() as stack:

        def write(name: str, lines: Iterator[str], header: str = "") -> None:
            handle = stack.enter_context(_Lines(stack.enter_context(writing(folder / name)), folder / name))
            rows[name] = handle.write(lines, advance, header)

        if dataset.kind is not Kind.QUESTIONS:
            alone = dataset.kind is Kind.PASSAGES
            write(CORPUS, map(_passage, islice(source.passages(), wanted.limit if alone else None)))
        if dataset.kind is not Kind.PASSAGES:
            kept: set[str] = set()
            write(QUESTIONS, _noted(islice(source.questions(), wanted.limit), kept))
            if dataset.kind is Kind.BOTH:
                write(QRELS, _judgements(source.judgements(), kept), "\t".join(QRELS_HEADER) + "\n")
    made = {
        name: PreparedFile(count, (folder / name).stat().st_size, checksum(folder / name))
        for name, count in rows.items()
    }
    known = cached.sources()
    manifest = Manifest(
        dataset.name,
        split,
        wanted.limit,
        {file.name: known[file.name].sha256 for file in files},
        made,
        left_out + source.empty,
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    manifest.save(folder)
    return manifest


def _need(cached: Cached, files: tuple[RemoteFile, ...], split: str | None) -> None:
    for file in files:
        if not cached.has(file):
            raise ArtifactError(
                f"{file.name} of {cached.dataset.name} is not in {cached.root}, or not whole.",
                remedy=f"Run {cached.fetching(split)}.",
            )


class _Lines:
    """A file of lines; a disk that is full is told with its name and not with that of what is read meanwhile."""

    def __init__(self, temporary: Path, path: Path) -> None:
        self._temporary, self._path = temporary, path
        self._handle: IO[str] | None = None

    def __enter__(self) -> _Lines:
        self._handle = self._temporary.open("w", encoding="utf-8", newline="\n")
        return self

    def write(self, lines: Iterator[str], advance: Advance, header: str = "") -> int:
        """Write all lines and say how many there were, without the header."""
        assert self._handle is not None
        self._handle.write(header)
        count = 0
        for line in lines:
            try:
                self._handle.write(line + "\n")
            except OSError as error:
                raise wrap_os_error(error, self._path) from error
            count += 1
            advance(1)
        return count

    def __exit__(self, *_: object) -> None:
        assert self._handle is not None
        self._handle.close()


def _passage(passage: Passage) -> str:
    title = passage.metadata.get("title", "")
    rest = {key: value for key, value in passage.metadata.items() if key != "title"}
    row = {"_id": passage.id, "title": title, "text": passage.text, **({"metadata": rest} if rest else {})}
    return json.dumps(row, ensure_ascii=False)


def _noted(questions: Iterator[AnsweredQuestion], kept: set[str]) -> Iterator[str]:
    for question in questions:
        kept.add(question.id)
        row = {"id": question.id, "question": question.question, "answers": list(question.answers)}
        yield json.dumps(row, ensure_ascii=False)


def _judgements(judgements: Iterator[Judgement], kept: set[str]) -> Iterator[str]:
    for judgement in judgements:
        if judgement.question in kept:
            yield f"{judgement.question}\t{judgement.passage}\t{judgement.score}"
