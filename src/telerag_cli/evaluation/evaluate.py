"""The evaluation as a whole: scores of each run, intervals, and the runs compared two by two."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from telerag_cli.errors import InputError
from telerag_cli.evaluation.answers import contains, normalized, score_answer
from telerag_cli.evaluation.bootstrap import (
    CONFIDENCE,
    MIN_QUESTIONS,
    Difference,
    Estimate,
    Sampling,
    difference,
    estimate,
)
from telerag_cli.evaluation.judgements import Judgements, has_relevant, judgements_of, trec_id
from telerag_cli.evaluation.records import GoldQuestion, Run
from telerag_cli.progress import Advance

FORMAT, VERSION = "telerag-eval", 1
DEFAULT_CUTOFFS = (1, 3, 5, 10)
SHOWN_IDS = 5
Scores = dict[str, dict[str, float]]
"""By measure and question id."""


class JudgedBy(StrEnum):
    """What says which passages are relevant: qrels, the file of questions, or whether they contain a gold answer."""

    QRELS = "qrels"
    PASSAGES = "passages"
    ANSWERS = "answers"


@dataclass(frozen=True)
class Reference:
    """What the runs are measured against, apart from the gold answers on their own lines."""

    questions: Mapping[str, GoldQuestion] = field(default_factory=dict)
    """The file of questions, by id."""
    questions_name: str = ""
    qrels: Judgements | None = None
    qrels_name: str = ""

    @cached_property
    def _judgements(self) -> Judgements:
        return judgements_of(self.questions.values()) if self.qrels is None else self.qrels

    @property
    def judged_by(self) -> JudgedBy:
        """The first of qrels, named passages and answers that there is."""
        if self.qrels is not None:
            return JudgedBy.QRELS
        return JudgedBy.PASSAGES if self._judgements else JudgedBy.ANSWERS

    def gold(self, run: Run) -> dict[str, tuple[str, ...]]:
        """Return the gold answers to each question that has some: from the file, or else from the run's own line."""
        found = {}
        for key, record in run.records.items():
            known = self.questions.get(key)
            if answers := known.answers if known and known.answers else record.answers:
                found[key] = answers
        return found

    def judged(self, run: Run, gold: Mapping[str, tuple[str, ...]]) -> Judgements:
        """Return judgements of the run's questions; by answers, of those whose passages all have their text."""
        if self.judged_by is not JudgedBy.ANSWERS:
            keys = map(trec_id, run.records)
            return {key: self._judgements[key] for key in keys if has_relevant(self._judgements.get(key, {}))}
        found = {key: run.records[key].passages for key in gold}
        if not any(found.values()) or any(passage.text is None for passages in found.values() for passage in passages):
            return {}
        wanted = {key: [normalized(answer) for answer in answers] for key, answers in gold.items()}
        return {
            trec_id(key): {
                trec_id(passage.id): int(contains(normalized(passage.text or ""), wanted[key])) for passage in passages
            }
            for key, passages in found.items()
        }

    def missing(self, run: Run) -> tuple[list[str], int, str]:
        """Return questions that the run lacks, how many it should have in all, and the file that says so."""
        if self.questions:
            return [key for key in self.questions if key not in run.records], len(self.questions), self.questions_name
        present = {trec_id(key) for key in run.records}
        judged = [key for key, grades in (self.qrels or {}).items() if has_relevant(grades)]
        return [key for key in judged if key not in present], len(judged), self.qrels_name


@dataclass(frozen=True)
class RunResult:
    """How good a run is."""

    run: str
    source: str
    lines: int
    failed: int
    """Lines with an error; they have 0 in every measure."""
    without_gold: int
    """Lines whose question has no gold answer; they do not count in the measures of answers."""
    unjudged: int
    """Lines whose question has no relevant passage to be found; they do not count in the measures of passages."""
    missing: list[str]
    """Ids of questions for which the run has no line; they do not count at all."""
    most_passages: int
    measures: dict[str, Estimate]


@dataclass(frozen=True)
class RunComparison:
    """How the second of two runs differs from the first, over the questions that both answered."""

    first: str
    second: str
    questions: int
    identical_answers: int | None
    """None if one of them answers nothing."""
    identical_passages: int | None
    """The same ids in the same order; None if one of them retrieved nothing."""
    measures: dict[str, Difference]


@dataclass(frozen=True)
class Evaluation:
    """What ``telerag eval`` found."""

    judged_by: JudgedBy | None
    """None if no passage was judged."""
    cutoffs: list[int]
    sampling: Sampling
    runs: list[RunResult]
    comparisons: list[RunComparison]
    notes: list[str]
    """What a reader must know of the figures, in sentences."""

    def as_json(self) -> dict[str, Any]:
        """Return an object; its fields are described in docs/eval.md."""
        fields = asdict(self)
        bootstrap = {**fields.pop("sampling"), "confidence": CONFIDENCE, "fewest_questions": MIN_QUESTIONS}
        return {"format": FORMAT, "version": VERSION, "bootstrap": bootstrap, **fields}


def evaluate(
    runs: Sequence[Run],
    reference: Reference,
    cutoffs: Sequence[int] | None,
    sampling: Sampling,
    advance: Advance = lambda _lines: None,
) -> Evaluation:
    """Measure runs of different names, and compare them two by two.

    Without ``cutoffs``, recall or success is measured at the usual ones, and none beyond what the runs retrieved.

    Raises:
        InputError: no question of the runs is in the file of questions, or there is nothing to measure.
    """
    deepest = max(run.most_passages for run in runs)
    wanted = sorted(set(cutoffs) if cutoffs else {min(cutoff, deepest) for cutoff in DEFAULT_CUTOFFS} - {0})
    results, scored, notes = [], [], []
    for run in runs:
        result, scores = _measure(run, reference, wanted, sampling, advance)
        results.append(result)
        scored.append((run, scores))
        notes += [f"{run.name}: {note}" for note in _notes(run, result, reference, max(cutoffs or [0]))]
    comparisons = [_compare(*first, *second, sampling) for first, second in itertools.combinations(scored, 2)]
    if not comparisons and not results[0].measures:
        raise InputError(
            f"{runs[0].source} has {len(runs[0].records):,} lines and nothing that they could be measured against.",
            remedy="Give gold answers with --questions, or judged passages with --qrels.",
        )
    judged_by = reference.judged_by if any("mrr" in result.measures for result in results) else None
    if judged_by is JudgedBy.ANSWERS:
        notes.append(
            "Passages are judged by whether they contain a gold answer: success@k is the share of questions with such "
            "a passage among the first k, and ndcg@10 knows only those that were retrieved."
        )
    return Evaluation(judged_by, wanted, sampling, results, comparisons, notes)


def _measure(
    run: Run, reference: Reference, cutoffs: Sequence[int], sampling: Sampling, advance: Advance
) -> tuple[RunResult, Scores]:
    missing, expected, named_by = reference.missing(run)
    if expected and len(missing) == expected and not any(record.answers for record in run.records.values()):
        raise InputError(
            f"None of the {expected:,} questions of {named_by} is among the {len(run.records):,} of {run.source}, "
            f"whose first has the id '{next(iter(run.records))}'.",
            remedy="Give the file of questions that the run was made from.",
        )
    gold, lines = reference.gold(run), len(run.records)
    judgements = reference.judged(run, gold)
    by_answers = reference.judged_by is JudgedBy.ANSWERS
    scores: Scores = {}
    if gold and (run.answers or run.failed == lines):
        scores = {"exact_match": {}, "f1": {}, "contains_answer": {}}
        for key, answers in gold.items():
            answer = run.records[key].answer
            found = dict.fromkeys(scores, 0.0) if answer is None else asdict(score_answer(answer, answers))
            for name, value in found.items():
                scores[name][key] = value
            advance(1)
    if judgements and run.most_passages:
        from telerag_cli.evaluation.passages import score_passages

        records = [record for key, record in run.records.items() if trec_id(key) in judgements]
        scores |= score_passages(records, judgements, cutoffs, complete=not by_answers)
    measures = {name: estimate(list(values.values()), sampling) for name, values in scores.items()}
    unjudged = lines - len(gold if by_answers else judgements)
    result = RunResult(
        run.name, run.source, lines, run.failed, lines - len(gold), unjudged, missing, run.most_passages, measures
    )
    return result, scores


def _compare(first: Run, scores: Scores, second: Run, others: Scores, sampling: Sampling) -> RunComparison:
    pairs = {
        key: (record, second.records[key])
        for key, record in first.records.items()
        if key in second.records and not record.failed and not second.records[key].failed
    }
    measures = {}
    for name in scores:
        shared = [key for key in pairs if key in scores[name] and key in others.get(name, {})]
        if shared:
            ours, theirs = ([values[name][key] for key in shared] for values in (scores, others))
            measures[name] = difference(ours, theirs, sampling)
    same_answers = sum(one.answer == two.answer for one, two in pairs.values())
    same_passages = sum(
        [passage.id for passage in one.passages] == [passage.id for passage in two.passages]
        for one, two in pairs.values()
    )
    return RunComparison(
        first.name,
        second.name,
        len(pairs),
        same_answers if first.answers and second.answers else None,
        same_passages if first.most_passages and second.most_passages else None,
        measures,
    )


def _notes(run: Run, result: RunResult, reference: Reference, deepest: int) -> Iterator[str]:
    """What must be said of a run's figures; ``deepest`` is the highest cutoff that was asked for."""
    lines, most = f"of {result.lines:,} lines", run.most_passages
    by_answers = reference.judged_by is JudgedBy.ANSWERS
    if result.failed:
        yield f"{result.failed:,} {lines} failed; they count as wrong."
    if result.missing:
        _, expected, named_by = reference.missing(run)
        more = f" and {len(result.missing) - SHOWN_IDS:,} more" if len(result.missing) > SHOWN_IDS else ""
        yield (
            f"{len(result.missing):,} of the {expected:,} questions of {named_by} have no line and are left out: "
            f"{', '.join(result.missing[:SHOWN_IDS])}{more}."
        )
    if result.without_gold and (run.answers or by_answers):
        what = "answers or passages" if by_answers and most else "answers"
        yield f"{result.without_gold:,} {lines} have no gold answer and are left out of the measures of {what}."
    if not by_answers and result.unjudged and most:
        yield f"{result.unjudged:,} {lines} have no relevant passage and are left out of the measures of passages."
    if by_answers and result.without_gold < result.lines and most and "mrr" not in result.measures:
        yield "passages without their text cannot be judged by the answers; give --qrels."
    if "mrr" in result.measures and deepest > most:
        yield f"it retrieved at most {most:,} passages per question, so figures at {deepest:,} are figures at {most:,}."
    if any(found.low is None for found in result.measures.values()):
        yield f"fewer than {MIN_QUESTIONS} questions allow no interval and no verdict."
