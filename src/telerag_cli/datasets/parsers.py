"""What the publishers' files hold, as questions, passages and judgements, one at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from telerag_cli.corpus.passages import Passage
from telerag_cli.corpus.readers import find_sources, read_passages
from telerag_cli.datasets.cache import Cached
from telerag_cli.datasets.catalogue import Kind, Parser, RemoteFile
from telerag_cli.datasets.streams import Bad, damage_told, json_array, json_lines, opened
from telerag_cli.errors import InputError, UsageError

T = TypeVar("T")
OnBad = Callable[[InputError], None]
QRELS_HEADER = ("query-id", "corpus-id", "score")
SKIP = "Fetch it again, or leave such entries out with --skip-bad."


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with all the answers that count as right; none where the dataset judges passages instead."""

    id: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Judgement:
    """How relevant a passage is to a question; 0 is not at all."""

    question: str
    passage: str
    score: int


class _UnusableError(ValueError):
    """Why an entry cannot be used."""


class _EmptyError(Exception):
    """There is nothing in a passage; some published ones are so."""


class Opened:
    """The fetched files of a dataset, read on demand, each time from the beginning."""

    def __init__(self, cached: Cached, split: str | None, on_bad: OnBad | None = None) -> None:
        """Take the files of a split.

        Args:
            cached: the dataset's folder; what is needed has been fetched.
            split: of the questions; None for a dataset of passages alone.
            on_bad: called with the error of each entry that cannot be used; without it the first one is raised.

        Raises:
            InputError: an archive is damaged.
            UsageError: there is no such split.
        """
        self._cached, self._split, self._on_bad = cached, split, on_bad
        self._dataset = cached.dataset
        self.empty = 0
        """Passages without any text that were left out."""
        self.files = self._dataset.files_of(split)
        self._archive = _Beir(cached.path(self.files[0]), split) if self._dataset.parser is Parser.BEIR else None

    def questions(self) -> Iterator[AnsweredQuestion]:
        """Those of the split."""
        if self._dataset.kind is Kind.PASSAGES:
            return
        for file in self.files:
            path = self._cached.path(file)
            member = self._member(file)
            label = f"{path.name}:{member}" if member else path.name
            with opened(path, member) as handle:
                yield from self._questions_of(handle, label)

    def passages(self) -> Iterator[Passage]:
        """All of them, whatever the split."""
        parser, path = self._dataset.parser, self._cached.path(self.files[0])
        if parser is Parser.DPR_PASSAGES:
            yield from read_passages(find_sources([str(path)]), on_bad=self._on_bad)
        elif parser is Parser.FLASHRAG_PASSAGES:
            member = next(iter(self.files[0].members.values()), None)
            with opened(path, member) as handle:
                yield from self._used(
                    json_lines(handle, self._bad(member or path.name)), _contents, member or path.name
                )
        elif self._archive is not None:
            label = f"{path.name}:{self._archive.corpus}"
            with opened(path, self._archive.corpus) as handle:
                yield from self._used(json_lines(handle, self._bad(label)), _beir_passage, label)

    def judgements(self) -> Iterator[Judgement]:
        """Those of the split."""
        if self._archive is None:
            return
        label = f"{self.files[0].name}:{self._archive.qrels}"
        bad = self._bad(label)
        with opened(self._cached.path(self.files[0]), self._archive.qrels) as handle:
            for line, raw in enumerate(handle, 1):
                try:
                    cells = raw.decode("utf-8").strip("\r\n").split("\t")
                    if cells == [""] or (line == 1 and tuple(cells) == QRELS_HEADER):
                        continue
                    question, passage, score = cells
                    yield Judgement(question, passage, int(score))
                except ValueError:
                    bad(line, f"{raw.rstrip()!r:.60} where {', '.join(QRELS_HEADER)} are expected")

    def _member(self, file: RemoteFile) -> str | None:
        if self._archive is not None:
            return self._archive.queries
        if not file.members:
            return None
        if self._split not in file.members:
            raise UsageError(
                f"{self._dataset.name} has the splits {', '.join(file.members)}, and not '{self._split}'.",
                remedy="Name one of them with --split.",
            )
        return file.members[self._split]

    def _questions_of(self, handle: IO[bytes], label: str) -> Iterator[AnsweredQuestion]:
        bad, parser = self._bad(label), self._dataset.parser
        if parser is Parser.HOTPOTQA:
            yield from self._used(json_array(handle, label, bad), _hotpotqa, label)
        elif parser is Parser.TRIVIAQA:
            yield from self._used(json_array(handle, label, bad, "Data"), _triviaqa, label)
        elif parser is Parser.FLASHRAG:
            yield from self._used(json_lines(handle, bad), _flashrag, label)
        elif parser is Parser.BEIR:
            judged = {judgement.question for judgement in self.judgements()}
            found = self._used(json_lines(handle, bad), _beir_question, label)
            yield from (question for question in found if question.id in judged)
        else:
            numbered = ((line, {"id": f"{self._split}-{line}", **row}) for line, row in json_lines(handle, bad))
            yield from self._used(numbered, _nq_open, label)

    def _used(
        self, rows: Iterator[tuple[int, dict[str, Any]]], parse: Callable[[dict[str, Any]], T], label: str
    ) -> Iterator[T]:
        bad = self._bad(label)
        for line, row in rows:
            try:
                yield parse(row)
            except _EmptyError:
                self.empty += 1
            except _UnusableError as reason:
                bad(line, reason)

    def _bad(self, label: str) -> Bad:
        def bad(line: int, reason: object) -> None:
            error = InputError(f"{label}:{line}: {reason}.", remedy=SKIP)
            if self._on_bad is None:
                raise error
            self._on_bad(error)

        return bad


class _Beir:
    """Where things are in one of BEIR's archives."""

    def __init__(self, path: Path, split: str | None) -> None:
        with damage_told(str(path)), zipfile.ZipFile(path) as archive:
            members = [PurePosixPath(name) for name in archive.namelist()]
        corpora = [member for member in members if member.name == "corpus.jsonl"]
        if len(corpora) != 1:
            raise InputError(
                f"{path} has {len(corpora)} files corpus.jsonl, and one of BEIR's archives has 1.",
                remedy="Fetch it again.",
            )
        root = corpora[0].parent
        splits = [member.stem for member in members if member.parent == root / "qrels" and member.suffix == ".tsv"]
        if split not in splits:
            raise UsageError(
                f"{path.name} has the splits {', '.join(sorted(splits)) or 'none'}, and not '{split}'.",
                remedy="Name one of them with --split.",
            )
        self.corpus = str(root / "corpus.jsonl")
        self.queries = str(root / "queries.jsonl")
        self.qrels = str(root / "qrels" / f"{split}.tsv")


def _nq_open(row: dict[str, Any]) -> AnsweredQuestion:
    return _question(row, "id", "question", row.get("answer"))


def _flashrag(row: dict[str, Any]) -> AnsweredQuestion:
    return _question(row, "id", "question", row.get("golden_answers"))


def _hotpotqa(row: dict[str, Any]) -> AnsweredQuestion:
    return _question(row, "_id", "question", row.get("answer"))


def _beir_question(row: dict[str, Any]) -> AnsweredQuestion:
    return _question(row, "_id", "text", [])


def _triviaqa(row: dict[str, Any]) -> AnsweredQuestion:
    answer = row.get("Answer")
    if answer is None:
        return _question(row, "QuestionId", "Question", [])
    if not isinstance(answer, dict) or not isinstance(answer.get("Aliases", []), list):
        raise _UnusableError("Answer is no object with a list of Aliases")
    first = [answer["Value"]] if "Value" in answer else []
    return _question(row, "QuestionId", "Question", [*first, *answer.get("Aliases", [])])


def _question(row: dict[str, Any], id_key: str, question_key: str, answers: Any) -> AnsweredQuestion:
    text = row.get(question_key)
    if not isinstance(text, str) or not text.strip():
        raise _UnusableError(f"no text in '{question_key}', but {text!r:.60}")
    found = [answers] if isinstance(answers, str) else answers
    if not isinstance(found, list) or not all(isinstance(answer, str) for answer in found):
        raise _UnusableError(f"the answers are {answers!r:.60}, and a list of texts is expected")
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


def _contents(row: dict[str, Any]) -> Passage:
    contents = row.get("contents")
    if not isinstance(contents, str) or not contents.strip():
        raise _UnusableError(f"no text in 'contents', but {contents!r:.60}")
    title, _, text = contents.partition("\n")
    title = title.strip().strip('"')
    if not text.strip():
        return Passage(_id(row, "id"), _writable(title))
    return Passage(_id(row, "id"), _writable(text), {"title": _writable(title)} if title else {})


def _id(row: dict[str, Any], key: str) -> str:
    found = row.get(key)
    if not isinstance(found, str | int) or isinstance(found, bool) or found == "":
        raise _UnusableError(f"'{key}' is {found!r:.60}, and no id")
    return _writable(str(found))


def _writable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _UnusableError("not valid UTF-8 text") from None
    return text
