"""What is measured: the lines of a run, and the answers and passages that their questions should have had."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from telerag_cli.engine.questions import ID_KEYS
from telerag_cli.errors import InputError

GOLD_KEYS = ("answers", "golden_answers")
"""Ours (and SQuAD's), and FlashRAG's."""


@dataclass(frozen=True)
class Found:
    """A retrieved passage. Score and text may be missing where a run was written by another program."""

    id: str
    score: float | None
    text: str | None


@dataclass(frozen=True)
class Record:
    """One line of a run."""

    id: str
    answer: str | None
    """None if it failed, or if nothing was to be answered, as in what ``telerag search --json`` prints."""
    passages: tuple[Found, ...]
    """Best first."""
    answers: tuple[str, ...]
    """Gold answers, if the line carries any."""
    failed: bool


@dataclass(frozen=True)
class Run:
    """All lines of a run, by the ids of their questions, in the order of the file."""

    name: str
    source: str
    records: Mapping[str, Record]

    @property
    def failed(self) -> int:
        """Lines that carry an error in place of an answer."""
        return sum(record.failed for record in self.records.values())

    @property
    def answers(self) -> bool:
        """Whether anything was answered, or should have been."""
        return any(record.answer is not None for record in self.records.values())

    @property
    def most_passages(self) -> int:
        """The most passages that a line has."""
        return max((len(record.passages) for record in self.records.values()), default=0)


@dataclass(frozen=True)
class Asked:
    """What a file of questions says of one: the gold answers, and the ids of passages that support them."""

    id: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]


def read_run(lines: Iterable[bytes], source: str, name: str) -> Run:
    """The lines of a run: those of ``telerag run``, ``telerag search --json``, or OpenAI's Batch output.

    Args:
        lines: UTF-8 text, one JSON object a line.
        source: of the lines, for messages.
        name: what the run is called in results.

    Raises:
        InputError: a line is torn or no run's line, an id comes twice, or there is no line.
    """
    records: dict[str, Record] = {}
    seen: dict[str, int] = {}
    for number, where, value in _objects(
        lines, source, "Cut the line off, or let telerag run --resume write it again."
    ):
        record = _batch_record(value, where) if "custom_id" in value else _record(value, where)
        _once(record.id, number, seen, source)
        records[record.id] = record
    if not records:
        raise InputError(f"{source} holds no line of a run.", remedy="Give what telerag run wrote.")
    return Run(name, source, records)


def read_asked(lines: Iterable[bytes], source: str, *, judged: bool = False) -> dict[str, Asked]:
    """Questions with their gold answers and supporting passages, by id; a line may lack either.

    Ids are found as ``telerag run`` finds them: a line without one has its number for an id.

    Args:
        lines: UTF-8 text, one JSON object a line.
        source: of the lines, for messages.
        judged: whether passages are judged elsewhere, so that the file need not have answers or passages, as BEIR's has
            not.

    Raises:
        InputError: a line is not JSON, its answers or passages are no lists of strings, an id comes twice, or there is
            nothing in the file to measure against.
    """
    found: dict[str, Asked] = {}
    seen: dict[str, int] = {}
    for number, where, value in _objects(lines, source, "Correct the line."):
        key = next((str(value[name]) for name in ID_KEYS if value.get(name) is not None), str(number))
        _once(key, number, seen, source)
        found[key] = Asked(key, _gold(value, where), _strings(value.get("passages", []), where, "passages"))
    if not found or not (judged or any(asked.answers or asked.passages for asked in found.values())):
        raise InputError(
            f"{source} has {len(found):,} questions and neither answers nor passages for any of them.",
            remedy='Give lines like {"id": ..., "question": ..., "answers": [...]}.',
        )
    return found


def names_of(sources: Sequence[str]) -> list[str]:
    """Short names that tell runs apart: as many of the last parts of their paths as are needed."""
    parts = [("<stdin>",) if source == "-" else PurePath(source).parts for source in sources]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(sources)


def some(ids: Sequence[str], shown: int = 5) -> str:
    """The first of many ids, for a sentence."""
    more = f" and {len(ids) - shown:,} more" if len(ids) > shown else ""
    return ", ".join(ids[:shown]) + more


def _objects(lines: Iterable[bytes], source: str, remedy: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, place for messages, object) of each line that is not blank."""
    for number, raw in enumerate(lines, 1):
        where = f"{source}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{where} is not UTF-8: {error.reason} at byte {error.start}.", remedy=remedy) from error
        if not line:
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            torn = "" if raw.endswith(b"\n") else ", and its line does not end"
            raise InputError(f"{where} is not JSON: {error}{torn}.", remedy=remedy) from error
        if not isinstance(value, dict):
            raise InputError(f"{where} is a JSON {type(value).__name__} and not an object.", remedy=remedy)
        yield number, where, value


def _once(key: str, number: int, seen: dict[str, int], source: str) -> None:
    if key in seen:
        raise InputError(
            f"{source}:{number} has the id '{key}', which line {seen[key]} has already.",
            remedy="Give every question an id of its own, and every run a file.",
        )
    seen[key] = number


def _record(value: dict[str, Any], where: str) -> Record:
    key = value.get("id")
    if key is None or not {"answer", "passages", "error"} & value.keys():
        raise InputError(
            f"{where} has {sorted(value)}, and a run's line has an id and an answer, passages or an error.",
            remedy="Give what telerag run or telerag search --json wrote.",
        )
    if value.get("error") is not None:
        return Record(str(key), None, (), _gold(value, where), failed=True)
    answer = value.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise InputError(
            f"{where} has an answer of type {type(answer).__name__} and not a string.", remedy="Correct the line."
        )
    return Record(str(key), answer, _passages(value, where), _gold(value, where), failed=False)


def _batch_record(value: dict[str, Any], where: str) -> Record:
    key = str(value["custom_id"])
    response = value.get("response")
    if value.get("error") is not None or (isinstance(response, dict) and response.get("status_code", 200) != 200):
        return Record(key, None, (), (), failed=True)
    try:
        body = response["body"]  # type: ignore[index]  # whatever it is, the next line tells
        answer = body["choices"][0]["message"]["content"]
        if not isinstance(answer, str):
            raise TypeError
    except (TypeError, LookupError) as error:
        raise InputError(
            f"{where} is a Batch line with neither an error nor a chat completion in its response.",
            remedy="Give the output of a batch, not its input.",
        ) from error
    ours = body.get("telerag")
    return Record(key, answer, _passages(ours if isinstance(ours, dict) else {}, where), (), failed=False)


def _passages(value: dict[str, Any], where: str) -> tuple[Found, ...]:
    """The line's passages, each once."""
    listed = value.get("passages") or []
    found: dict[str, Found] = {}
    if not isinstance(listed, list):
        raise InputError(
            f"{where} has passages of type {type(listed).__name__} and not a list.", remedy="Correct the line."
        )
    for rank, each in enumerate(listed, 1):
        key = each.get("id") if isinstance(each, dict) else None
        score, text = (each.get("score"), each.get("text")) if isinstance(each, dict) else (None, None)
        if not isinstance(key, str | int) or not _is_score(score) or not isinstance(text, str | None):
            raise InputError(
                f"{where} has as its passage {rank} no object with an id, and with a finite score and a text "
                "if it has any.",
                remedy="Correct the line.",
            )
        found.setdefault(str(key), Found(str(key), None if score is None else float(score), text))
    return tuple(found.values())


def _is_score(value: object) -> bool:
    """Whether it is none or a finite number; JSON has integers larger than any float, and Python's reads NaN."""
    number = isinstance(value, float | int) and not isinstance(value, bool)
    return value is None or (number and abs(value) <= sys.float_info.max)  # type: ignore[arg-type]  # a number


def _gold(value: dict[str, Any], where: str) -> tuple[str, ...]:
    """Gold answers: a list, one string, or an object with them as ``text``, as SQuAD has it."""
    key = next((name for name in GOLD_KEYS if value.get(name) is not None), None)
    if key is None:
        return ()
    answers = value[key]
    if isinstance(answers, dict):
        answers = answers.get("text")
    return _strings([answers] if isinstance(answers, str) else answers, where, key)


def _strings(value: Any, where: str, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InputError(f"{where} has {key} that are no list of strings.", remedy="Correct the line.")
    return tuple(each for each in value if each.strip())
