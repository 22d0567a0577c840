"""Relevance of passages to questions, and the files in which TREC and BEIR write it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import quote

import numpy as np

from telerag_cli.errors import InputError
from telerag_cli.evaluation.records import GoldQuestion, Run

Judgements = dict[str, dict[str, int]]
"""Grades by question and passage, both as `trec_id` writes them; above 0 is relevant."""

MAX_GRADE = 1000
"""The evaluator keeps a counter for every grade up to the highest."""
QRELS = "Give TREC or BEIR qrels; in TREC's form, a space within an id is %20."


def trec_id(key: str) -> str:
    """Return an id without white space, which separates the fields of TREC's files: a space becomes ``%20``."""
    return re.sub(r"\s", lambda space: quote(space[0]), key)


def read_qrels(lines: Iterable[bytes], source: str) -> Judgements:
    """Read judgements as TREC writes them (``question 0 passage grade``) or BEIR (``question passage grade``, tabs).

    Raises:
        InputError: a line has another form, a grade is not a whole number, a passage has two grades, or there is none.
    """
    found: Judgements = {}
    beir: bool | None = None
    for number, raw in enumerate(lines, 1):
        where = f"{source}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{where} is not UTF-8: {error.reason} at byte {error.start}.", remedy=QRELS) from error
        if not line.strip():
            continue
        if beir is None:
            tabbed = line.split("\t")
            beir = len(tabbed) == 3
            if beir and not _is_whole(tabbed[-1]):
                continue  # the header
        fields = [field.strip() for field in line.split("\t")] if beir else line.split()
        if len(fields) != (3 if beir else 4):
            form = "BEIR qrels have 3" if beir else "TREC qrels have 4"
            raise InputError(f"{where} has {len(fields)} fields, and {form}.", remedy=QRELS)
        question, passage, grade = fields[0], fields[-2], fields[-1]
        if not _is_whole(grade) or abs(int(grade)) > MAX_GRADE:
            raise InputError(
                f"{where} has the grade '{grade}', and a grade is a whole number up to {MAX_GRADE:,}.",
                remedy="Correct the line.",
            )
        known = found.setdefault(trec_id(question), {}).setdefault(trec_id(passage), int(grade))
        if known != int(grade):
            raise InputError(
                f"{where} gives the passage '{passage}' grade {grade} for '{question}', and an earlier line {known}.",
                remedy="Remove one of them.",
            )
    if not found:
        raise InputError(f"{source} holds no judgement.", remedy=QRELS)
    return found


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]{1,9}", text.strip()) is not None


def judgements_of(questions: Iterable[GoldQuestion]) -> Judgements:
    """Return judgements from the passages that a file of questions names: each is relevant, with grade 1."""
    return {trec_id(each.id): {trec_id(passage): 1 for passage in each.passages} for each in questions if each.passages}


def has_relevant(grades: Mapping[str, int]) -> bool:
    """Say whether there is anything to find."""
    return any(grade > 0 for grade in grades.values())


def scores_order(run: Run) -> bool:
    """Say whether sorting by the passages' own scores, as evaluators of TREC files do, gives the run's own order.

    It does not where queries of several rounds were merged, where scores are equal, or where there are none. Scores are
    compared as float32, which is what trec_eval reads them into.
    """
    for record in run.records.values():
        scores = [passage.score for passage in record.passages]
        if None in scores or not (np.diff(np.array(scores, np.float32)) < 0).all():
            return False
    return True


def trec_lines(run: Run, *, own_scores: bool) -> Iterator[str]:
    """Yield lines of a TREC run file, ``question Q0 passage rank score tag``, with scores or reciprocals of ranks."""
    tag = trec_id(run.name)
    for record in run.records.values():
        for rank, passage in enumerate(record.passages, 1):
            score = passage.score if own_scores else 1 / rank
            yield f"{trec_id(record.id)} Q0 {trec_id(passage.id)} {rank} {score!r} {tag}"
