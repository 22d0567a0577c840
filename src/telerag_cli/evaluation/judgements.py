"""Which passages are relevant to a question, and the files that TREC and BEIR write that in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import quote

import numpy as np

from telerag_cli.errors import InputError
from telerag_cli.evaluation.records import Asked, Run

Judgements = dict[str, dict[str, int]]
"""Grades by question and passage, both as `trec_id` writes them; above 0 is relevant."""

TREC_FIELDS = 4
BEIR_FIELDS = 3
MAX_GRADE = 1000
"""The evaluator keeps a counter for every grade up to the highest."""


def trec_id(key: str) -> str:
    """An id without white space, which separates the fields of TREC's files: a space becomes ``%20``."""
    return re.sub(r"\s", lambda space: quote(space[0]), key)


def read_qrels(lines: Iterable[bytes], source: str) -> Judgements:
    """Judgements in TREC's form (``question 0 passage grade``) or BEIR's (tabs: ``question passage grade``, with a header).

    Raises:
        InputError: a line has another form, a grade is no whole number, a passage has two grades, or there is no line.
    """
    found: Judgements = {}
    beir = False
    first = True
    for number, raw in enumerate(lines, 1):
        where = f"{source}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where} is not UTF-8: {error.reason} at byte {error.start}.", remedy="Give TREC or BEIR qrels."
            ) from error
        if not line.strip():
            continue
        header = False
        if first:
            tabbed = line.split("\t")
            beir = len(tabbed) == BEIR_FIELDS
            header = beir and not _is_whole(tabbed[-1])
            first = False
        if header:
            continue
        question, passage, grade = _fields(line, where, beir)
        grades = found.setdefault(trec_id(question), {})
        if grades.setdefault(trec_id(passage), grade) != grade:
            raise InputError(
                f"{where} gives the passage '{passage}' grade {grade} for '{question}', and an earlier line "
                f"gives {grades[trec_id(passage)]}.",
                remedy="Remove one of them.",
            )
    if not found:
        raise InputError(f"{source} holds no judgement.", remedy="Give TREC or BEIR qrels.")
    return found


def _fields(line: str, where: str, beir: bool) -> tuple[str, str, int]:
    fields = [field.strip() for field in line.split("\t")] if beir else line.split()
    wanted = BEIR_FIELDS if beir else TREC_FIELDS
    if len(fields) != wanted:
        raise InputError(
            f"{where} has {len(fields)} fields, and {'BEIR' if beir else 'TREC'} qrels have {wanted}.",
            remedy="In TREC's form, write a space within an id as %20.",
        )
    if not _is_whole(fields[-1]) or abs(int(fields[-1])) > MAX_GRADE:
        raise InputError(
            f"{where} has the grade '{fields[-1]}', and a grade is a whole number up to {MAX_GRADE:,}.",
            remedy="Correct the line.",
        )
    return fields[0], fields[-2], int(fields[-1])


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]{1,9}", text.strip()) is not None


def judgements_of(asked: Iterable[Asked]) -> Judgements:
    """Judgements from the passages that a file of questions names: each is relevant, with grade 1."""
    return {trec_id(each.id): {trec_id(passage): 1 for passage in each.passages} for each in asked if each.passages}


def has_relevant(grades: Mapping[str, int]) -> bool:
    """Whether there is anything to find."""
    return any(grade > 0 for grade in grades.values())


def scores_order(run: Run) -> bool:
    """Whether sorting by the passages' own scores, as evaluators of TREC files do, gives the run's own order.

    It does not where queries of several rounds were merged, where scores are equal, or where there are none. Scores are
    compared as float32, which is what trec_eval reads them into.
    """
    for record in run.records.values():
        scores = [passage.score for passage in record.passages]
        if any(score is None for score in scores):
            return False
        if len(scores) > 1 and not bool((np.diff(np.asarray(scores, np.float32)) < 0).all()):
            return False
    return True


def trec_lines(run: Run, *, own_scores: bool) -> Iterator[str]:
    """Lines of a TREC run file: ``question Q0 passage rank score tag``.

    Args:
        run: what was retrieved; failed lines have no passages and so no line.
        own_scores: write the passages' scores, and not the reciprocals of their ranks.
    """
    tag = trec_id(run.name)
    for record in run.records.values():
        for rank, passage in enumerate(record.passages, 1):
            score = passage.score if own_scores else 1 / rank
            yield f"{trec_id(record.id)} Q0 {trec_id(passage.id)} {rank} {score!r} {tag}"
