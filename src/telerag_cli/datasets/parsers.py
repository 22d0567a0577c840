"""Questions, passages and judgements in the publishers' files, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from telerag_cli.corpus.passages import Passage
from telerag_cli.corpus.readers import read_passages
from telerag_cli.corpus.sources import find_sources
from telerag_cli.datasets.cache import Cached
from telerag_cli.datasets.catalogue import DatasetKind, Parser, no_split
from telerag_cli.datasets.streams import OnBad, Row, archive_errors, json_array, json_lines, lines_of, open_zip, opened
from telerag_cli.errors import InputError, TeleragError

T = TypeVar("T")
QRELS_HEADER = ("query-id", "corpus-id", "score")
QUESTION_KEYS = {
    Parser.NQ_OPEN: ("id", "question", "answer"),
    Parser.FLASHRAG: ("id", "question", "golden_answers"),
    Parser.HOTPOTQA: ("_id", "question", "answer"),
    Parser.TRIVIAQA: ("QuestionId", "Question", "Answer"),
    Parser.BEIR: ("_id", "text", None),
}
"""Keys of a question's id, text and answers."""


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with all answers that count as right; none where the dataset judges passages instead."""

    id: str
    question: str
    answers: tuple[str, ...]


class _UnusableError(ValueError):
    """Why an entry cannot be used."""


class _EmptyError(Exception):
    """A passage without text; some published ones are so."""


class DatasetReader:
    """The fetched files of a dataset; every call reads from the beginning."""

    def __init__(self, cached: Cached, split: str | None, on_bad: Callable[[TeleragError], None] | None = None) -> None:
        """Take the files of a split, or of a dataset of passages alone; they have been fetched.

        ``on_bad`` is called with the error of each entry that cannot be used; without it the first one is raised.

        Raises:
            InputError: an archive is damaged.
            UsageError: there is no such split.
        """
        self._dataset, self._split, self._on_bad = cached.dataset, split, on_bad
        self.files = cached.dataset.files_of(split)
        self._paths = {file.name: cached.path(file) for file in self.files}
        self._path = cached.path(self.files[0])
        self._beir = self._beir_members() if self._dataset.parser is Parser.BEIR else {}
        self.empty = 0
        """Passages without any text that were left out."""

    def questions(self) -> Iterator[AnsweredQuestion]:
        """Read the questions of the split."""
        parser = self._dataset.parser
        judged = {question for question, _passage, _score in self.judgements()}
        for file in self.files if self._dataset.kind is not DatasetKind.PASSAGES else ():
            member = self._beir.get("queries")
            if file.members:
                if self._split not in file.members:
                    raise no_split(self._dataset.name, tuple(file.members), self._split)
                member = file.members[self._split]
            for line, row in self._rows(file.name, member):
                if parser is Parser.NQ_OPEN:
                    row = {"id": f"{self._split}-{line}", **row}
                question = self._used(
                    line, row, lambda row: _question(row, *QUESTION_KEYS[parser]), member or file.name
                )
                if question is not None and (parser is not Parser.BEIR or question.id in judged):
                    yield question

    def passages(self) -> Iterator[Passage]:
        """Read all passages, whatever the split."""
        file = self.files[0]
        if self._dataset.parser is Parser.DPR_PASSAGES:
            yield from read_passages(find_sources([str(self._path)]), on_bad=self._on_bad)
            return
        member = self._beir.get("corpus") or next(iter(file.members.values()), None)
        parse = _beir_passage if self._beir else _flashrag_passage
        for line, row in self._rows(file.name, member):
            passage = self._used(line, row, parse, member or file.name)
            if passage is not None:
                yield passage

    def judgements(self) -> Iterator[tuple[str, str, int]]:
        """Read (question, passage, relevance) of the split; 0 is not relevant at all."""
        if not self._beir:
            return
        on_bad = self._bad(self._beir["qrels"])
        with opened(self._path, self._beir["qrels"]) as handle:
            for line, raw in lines_of(handle, on_bad):
                try:
                    cells = raw.decode("utf-8").strip("\r\n").split("\t")
                    if cells == [""] or (line == 1 and tuple(cells) == QRELS_HEADER):
                        continue
                    question, passage, score = cells
                    yield question, passage, int(score)
                except ValueError:
                    on_bad(line, f"{raw.rstrip()!r:.60} where {', '.join(QRELS_HEADER)} are expected")

    def _rows(self, name: str, member: str | None) -> Iterator[Row]:
        label = member or name
        with opened(self._paths[name], member) as handle:
            if self._dataset.parser is Parser.HOTPOTQA:
                yield from json_array(handle, label, self._bad(label))
            elif self._dataset.parser is Parser.TRIVIAQA:
                yield from json_array(handle, label, self._bad(label), "Data")
            else:
                yield from json_lines(handle, self._bad(label))

    def _used(self, line: int, row: dict[str, Any], parse: Callable[[dict[str, Any]], T], label: str) -> T | None:
        try:
            return parse(row)
        except _EmptyError:
            self.empty += 1
        except _UnusableError as reason:
            self._bad(label)(line, reason)
        return None

    def _bad(self, label: str) -> OnBad:
        place = label if label == self._path.name else f"{self._path.name}:{label}"

        def on_bad(line: int, reason: object) -> None:
            remedy = "Fetch it again, or leave out such entries with --skip-bad."
            error = InputError(f"{place}:{line}: {reason}.", remedy=remedy)
            if self._on_bad is None:
                raise error
            self._on_bad(error)

        return on_bad

    def _beir_members(self) -> dict[str, str]:
        with archive_errors(str(self._path)), open_zip(self._path) as archive:
            members = [PurePosixPath(name) for name in archive.namelist()]
        corpora = [member for member in members if member.name == "corpus.jsonl"]
        if len(corpora) != 1:
            raise InputError(
                f"{self._path} has {len(corpora)} files corpus.jsonl, and one of BEIR's archives has 1.",
                remedy="Fetch it again.",
            )
        root = corpora[0].parent
        splits = [member.stem for member in members if member.parent == root / "qrels" and member.suffix == ".tsv"]
        if self._split not in splits:
            raise no_split(self._path.name, tuple(sorted(splits)), self._split)
        names = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": f"qrels/{self._split}.tsv"}
        return {what: str(root / name) for what, name in names.items()}


def _question(row: dict[str, Any], id_key: str, question_key: str, answers_key: str | None) -> AnsweredQuestion:
    text = row.get(question_key)
    if not isinstance(text, str) or not text.strip():
        raise _UnusableError(f"no text in '{question_key}', but {text!r:.60}")
    answers = row.get(answers_key) if answers_key else []
    if answers_key == "Answer":  # TriviaQA's: an object, or nothing where the answers are secret
        value = answers if answers is not None else {"Aliases": []}
        answers = None
        if isinstance(value, dict) and isinstance(value.get("Aliases", []), list):
            answers = [*([value["Value"]] if "Value" in value else []), *value.get("Aliases", [])]
    found = [answers] if isinstance(answers, str) else answers
    if not isinstance(found, list) or not all(isinstance(answer, str) for answer in found):
        raise _UnusableError(f"the answers are {row.get(answers_key or '')!r:.60}, and a list of texts is expected")
    return AnsweredQuestion(_id(row, id_key), _writable(text.strip()), tuple(dict.fromkeys(map(_writable, found))))


def _beir_passage(row: dict[str, Any]) -> Passage:
    title, text = row.get("title") or "", row.get("text")
    if not isinstance(text, str) or not isinstance(title, str):
        raise _UnusableError(f"the text is {text!r:.60}, and the title {title!r:.60}")
    # Some of BEIR's passages are a title alone, which is then the text: passages without one are refused later.
    body, heading = (text, title) if text.strip() else (title, "")
    if not body.strip():
        raise _EmptyError
    metadata = dict(row["metadata"]) if isinstance(row.get("metadata"), dict) else {}
    if heading.strip():
        metadata["title"] = heading
    passage = Passage(_id(row, "_id"), _writable(body), metadata)
    _writable(passage.metadata_json)
    return passage


def _flashrag_passage(row: dict[str, Any]) -> Passage:
    contents = row.get("contents")
    if not isinstance(contents, str) or not contents.strip():
        raise _UnusableError(f"no text in 'contents', but {contents!r:.60}")
    title, _, text = contents.partition("\n")
    title = _writable(title.strip().strip('"'))
    if not text.strip():
        return Passage(_id(row, "id"), title)
    return Passage(_id(row, "id"), _writable(text), {"title": title} if title else {})


def _id(row: dict[str, Any], key: str) -> str:
    found = row.get(key)
    if not isinstance(found, str | int) or isinstance(found, bool) or found == "":
        raise _UnusableError(f"'{key}' is {found!r:.60}, which is not an id")
    return _writable(str(found))


def _writable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _UnusableError("not valid UTF-8 text") from None
    return text
