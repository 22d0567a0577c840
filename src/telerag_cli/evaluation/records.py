"""Input of an evaluation: the lines of a run, and the answers and passages that their questions should have had."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from telerag_cli.engine.questions import ID_KEYS
from telerag_cli.errors import InputError
from telerag_cli.text import TextError, parse_json

GOLD_KEYS = ("answers", "golden_answers")
"""Ours (and SQuAD's), and FlashRAG's."""
CORRECT = "Correct the line."


@dataclass(frozen=True)
class RetrievedPassage:
    """A passage of a run's line. Score and text may be missing where another program wrote it."""

    id: str
    score: float | None
    text: str | None


@dataclass(frozen=True)
class Record:
    """One line of a run."""

    id: str
    answer: str | None = None
    """None if it failed, or if only passages were wanted, as in the output of ``telerag search --json``."""
    passages: tuple[RetrievedPassage, ...] = ()
    """Best first."""
    answers: tuple[str, ...] = ()
    """Gold answers, if the line has any."""
    failed: bool = False


@dataclass(frozen=True)
class Run:
    """All lines of a run, by the ids of their questions, in the order of the file."""

    name: str
    source: str
    records: Mapping[str, Record]

    @property
    def failed(self) -> int:
        """Number of lines with an error in place of an answer."""
        return sum(record.failed for record in self.records.values())

    @property
    def answers(self) -> bool:
        """Whether anything was answered."""
        return any(record.answer is not None for record in self.records.values())

    @property
    def most_passages(self) -> int:
        """The most passages that a line has."""
        return max((len(record.passages) for record in self.records.values()), default=0)


@dataclass(frozen=True)
class GoldQuestion:
    """What a file of questions says of one: the gold answers, and the ids of passages that support them."""

    id: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]


def read_run(lines: Iterable[bytes], source: str, name: str) -> Run:
    """Read the lines of ``telerag run``, ``telerag search --json``, or OpenAI's Batch output.

    ``source`` is what messages call the lines, and ``name`` what results call the run.

    Raises:
        InputError: a line is torn or is not of a run, an id comes twice, or there is no line.
    """
    records: dict[str, Record] = {}
    remedy = "Cut the line off, or let telerag run --resume write it again."
    for key, where, value in _objects(lines, source, ("custom_id", "id"), remedy):
        records[key] = _batch_record(key, value, where) if "custom_id" in value else _record(key, value, where)
    if not records:
        raise InputError(f"{source} holds no line of a run.", remedy="Give what telerag run wrote.")
    return Run(name, source, records)


def read_gold(lines: Iterable[bytes], source: str, *, judged: bool = False) -> dict[str, GoldQuestion]:
    """Read questions with their gold answers and supporting passages, by id; a line may lack either.

    Ids are found as ``telerag run`` finds them: a line without one has its number for an id.
    If passages are ``judged`` elsewhere, as BEIR's are, the file needs neither answers nor passages.

    Raises:
        InputError: a line is not JSON, its answers or passages are not lists of strings, an id comes twice, or there
            is nothing in the file to measure against.
    """
    found = {
        key: GoldQuestion(key, _gold(value, where), _strings(value.get("passages", []), where, "passages"))
        for key, where, value in _objects(lines, source, ID_KEYS, CORRECT)
    }
    if not found or not (judged or any(question.answers or question.passages for question in found.values())):
        raise InputError(
            f"{source} has {len(found):,} questions and neither answers nor passages for any of them.",
            remedy='Give lines like {"id": ..., "question": ..., "answers": [...]}.',
        )
    return found


def names_of(sources: Sequence[str]) -> list[str]:
    """Return short names that tell runs apart: as many of the last parts of their paths as are needed."""
    parts = [("<stdin>",) if source == "-" else PurePath(source).parts for source in sources]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(sources)


def _objects(
    lines: Iterable[bytes], source: str, id_keys: Sequence[str], remedy: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield id, place for messages, and object of each line that is not blank."""
    seen: dict[str, int] = {}
    for number, raw in enumerate(lines, 1):
        where = f"{source}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            value = parse_json(line) if line else None
        except UnicodeDecodeError as error:
            raise InputError(f"{where} is not UTF-8: {error.reason} at byte {error.start}.", remedy=remedy) from error
        except TextError as error:
            torn = "" if raw.endswith(b"\n") else ", and its line does not end"
            raise InputError(f"{where} is not JSON: {error}{torn}.", remedy=remedy) from error
        if not line:
            continue
        if not isinstance(value, dict):
            raise InputError(f"{where} is a JSON {type(value).__name__} and not an object.", remedy=remedy)
        key = next((str(value[name]) for name in id_keys if value.get(name) is not None), str(number))
        if key in seen:
            raise InputError(
                f"{where} has the id '{key}', as line {seen[key]} has.",
                remedy="Give every question an id of its own, and every run a file.",
            )
        seen[key] = number
        yield key, where, value


def _record(key: str, value: dict[str, Any], where: str) -> Record:
    if value.get("id") is None or not {"answer", "passages", "error"} & value.keys():
        raise InputError(
            f"{where} has {sorted(value)}, and a run's line has an id and an answer, passages or an error.",
            remedy="Give what telerag run or telerag search --json wrote.",
        )
    gold, answer = _gold(value, where), value.get("answer")
    if value.get("error") is not None:
        return Record(key, answers=gold, failed=True)
    if answer is not None and not isinstance(answer, str):
        raise InputError(f"{where} has an answer of type {type(answer).__name__} and not a string.", remedy=CORRECT)
    return Record(key, answer, _passages(value, where), gold)


def _batch_record(key: str, value: dict[str, Any], where: str) -> Record:
    response = value.get("response")
    if value.get("error") is not None or (isinstance(response, dict) and response.get("status_code", 200) != 200):
        return Record(key, failed=True)
    match response:
        case {"body": {"choices": [{"message": {"content": str(answer)}}, *_]} as body}:
            ours = body.get("telerag")
            return Record(key, answer, _passages(ours if isinstance(ours, dict) else {}, where))
    raise InputError(
        f"{where} is a Batch line with neither an error nor a chat completion in its response.",
        remedy="Give the output of a batch, not its input.",
    )


def _passages(value: dict[str, Any], where: str) -> tuple[RetrievedPassage, ...]:
    """Return the line's passages, each once."""
    listed = value.get("passages") or []
    found: dict[str, RetrievedPassage] = {}
    if not isinstance(listed, list):
        raise InputError(f"{where} has passages of type {type(listed).__name__} and not a list.", remedy=CORRECT)
    for rank, each in enumerate(listed, 1):
        fields = each if isinstance(each, dict) else {}
        key, score, text = fields.get("id"), fields.get("score"), fields.get("text")
        if not isinstance(key, str | int) or not _is_score(score) or not isinstance(text, str | None):
            raise InputError(
                f"{where}: passage {rank} is not an object with an id, and a finite score and a text if it has any.",
                remedy=CORRECT,
            )
        found.setdefault(str(key), RetrievedPassage(str(key), None if score is None else float(score), text))
    return tuple(found.values())


def _is_score(value: Any) -> bool:
    """None or a finite number; JSON has integers larger than any float, and Python's reads NaN."""
    number = isinstance(value, float | int) and not isinstance(value, bool)
    return value is None or (number and abs(value) <= sys.float_info.max)


def _gold(value: dict[str, Any], where: str) -> tuple[str, ...]:
    """Return gold answers from a list, one string, or an object with them as ``text``, as SQuAD has it."""
    key = next((name for name in GOLD_KEYS if value.get(name) is not None), None)
    if key is None:
        return ()
    answers = value[key].get("text") if isinstance(value[key], dict) else value[key]
    return _strings([answers] if isinstance(answers, str) else answers, where, key)


def _strings(value: Any, where: str, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InputError(f"{where} has {key} that are not a list of strings.", remedy=CORRECT)
    return tuple(each for each in value if each.strip())
