"""All of it together: scores of each run, intervals, and the runs compared two by two."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from telerag_cli.errors import InputError
from telerag_cli.evaluation.bootstrap import CONFIDENCE, FEWEST, Difference, Estimate, Sampling, difference, estimate
from telerag_cli.evaluation.judgements import Judgements, has_relevant, judgements_of, trec_id
from telerag_cli.evaluation.records import Asked, Run, some

FORMAT = "telerag-eval"
VERSION = 1
DEFAULT_CUTOFFS = (1, 3, 5, 10)

Scores = dict[str, dict[str, float]]
"""By measure and question id."""


class JudgedBy(StrEnum):
    """What says which passages are relevant."""

    QRELS = "qrels"
    PASSAGES = "passages"
    """Those that the file of questions names."""
    ANSWERS = "answers"
    """Those that contain a gold answer."""


@dataclass(frozen=True)
class Reference:
    """What the runs are measured against, apart from the gold answers that their own lines carry."""

    asked: Mapping[str, Asked] = field(default_factory=dict)
    """The file of questions, by id."""
    asked_name: str = ""
    qrels: Judgements | None = None
    qrels_name: str = ""

    @cached_property
    def _judgements(self) -> Judgements:
        return judgements_of(self.asked.values()) if self.qrels is None else self.qrels

    @property
    def judged_by(self) -> JudgedBy:
        """Who judges passages: the first of qrels, named passages and answers that there is."""
        if self.qrels is not None:
            return JudgedBy.QRELS
        return JudgedBy.PASSAGES if self._judgements else JudgedBy.ANSWERS

    def gold(self, run: Run) -> dict[str, tuple[str, ...]]:
        """The gold answers to each question that has some: those of the file, or else of the run's own line."""
        found = {}
        for key, record in run.records.items():
            asked = self.asked.get(key)
            answers = asked.answers if asked and asked.answers else record.answers
            if answers:
                found[key] = answers
        return found

    def judged(self, run: Run) -> Judgements:
        """Judgements for those of the run's questions that have a relevant passage."""
        keys = map(trec_id, run.records)
        return {key: self._judgements[key] for key in keys if has_relevant(self._judgements.get(key, {}))}

    def missing(self, run: Run) -> tuple[list[str], int, str]:
        """Questions that the run should have and has not, how many there are in all, and the file that says so."""
        if self.asked:
            return [key for key in self.asked if key not in run.records], len(self.asked), self.asked_name
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
    """Lines that carry an error; they have 0 in every measure."""
    without_gold: int
    """Lines whose question has no gold answer; they have no part in the measures of answers."""
    unjudged: int
    """Lines whose question has no relevant passage to be found; they have no part in the measures of passages."""
    missing: list[str]
    """Ids of questions that the run has no line for; they have no part in anything."""
    most_passages: int
    measures: dict[str, Estimate]


@dataclass(frozen=True)
class Comparison:
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
    comparisons: list[Comparison]
    notes: list[str]
    """What a reader must know of the figures, in sentences."""

    def as_json(self) -> dict[str, Any]:
        """As an object; its fields are described in docs/eval.md."""
        told = asdict(self)
        bootstrap = {**told.pop("sampling"), "confidence": CONFIDENCE, "fewest_questions": FEWEST}
        return {"format": FORMAT, "version": VERSION, "bootstrap": bootstrap, **told}


def evaluate(
    runs: Sequence[Run],
    reference: Reference,
    cutoffs: Sequence[int] | None,
    sampling: Sampling,
    advance: Callable[[int], None] = lambda _lines: None,
) -> Evaluation:
    """Measure runs, and compare them two by two.

    Args:
        runs: at least one, with different names.
        reference: gold answers and judgements.
        cutoffs: ranks for recall or success; None for the usual ones, none beyond what the runs retrieved.
        sampling: for the intervals.
        advance: told of lines whose answers are scored.

    Raises:
        InputError: no question of the runs is in the file of questions, or there is nothing to measure.
    """
    deepest = max(run.most_passages for run in runs)
    usual = {min(cutoff, deepest) for cutoff in DEFAULT_CUTOFFS} - {0}
    wanted = sorted(set(cutoffs) if cutoffs else usual)
    measured = [(run, _scores(run, reference, wanted, advance)) for run in runs]
    results = [_result(run, scores, reference, sampling) for run, scores in measured]
    comparisons = [_compare(first, second, sampling) for first, second in itertools.combinations(measured, 2)]
    if not comparisons and not results[0].measures:
        raise InputError(
            f"{runs[0].source} has {len(runs[0].records):,} lines and nothing that they could be measured against.",
            remedy="Give gold answers with --questions, or judged passages with --qrels.",
        )
    judged_by = reference.judged_by if any("mrr" in result.measures for result in results) else None
    notes = [
        note
        for run, result in zip(runs, results, strict=True)
        for note in _notes(run, result, reference, max(cutoffs or [0]))
    ]
    if judged_by is JudgedBy.ANSWERS:
        notes.append(
            "Passages are judged by whether they contain a gold answer: success@k is the share of questions with such a "
            "passage among the first k, and ndcg@10 knows of no such passages but those retrieved."
        )
    return Evaluation(judged_by, wanted, sampling, results, comparisons, notes)


def _scores(run: Run, reference: Reference, cutoffs: Sequence[int], advance: Callable[[int], None]) -> Scores:
    missing, expected, told_by = reference.missing(run)
    if expected and len(missing) == expected and not any(record.answers for record in run.records.values()):
        raise InputError(
            f"None of the {expected:,} questions of {told_by} is among the {len(run.records):,} of {run.source}, "
            f"whose first has the id '{next(iter(run.records))}'.",
            remedy="Give the file of questions that the run was made from.",
        )
    gold = reference.gold(run)
    judgements = _by_answers(run, gold) if reference.judged_by is JudgedBy.ANSWERS else reference.judged(run)
    return _answer_scores(run, gold, advance) | _passage_scores(
        run, judgements, cutoffs, complete=reference.judged_by is not JudgedBy.ANSWERS
    )


def _result(run: Run, scores: Scores, reference: Reference, sampling: Sampling) -> RunResult:
    lines, gold = len(run.records), reference.gold(run)
    judged = len(gold if reference.judged_by is JudgedBy.ANSWERS else reference.judged(run))
    measures = {name: estimate(list(values.values()), sampling) for name, values in scores.items()}
    return RunResult(
        run.name,
        run.source,
        lines,
        run.failed,
        lines - len(gold),
        lines - judged,
        reference.missing(run)[0],
        run.most_passages,
        measures,
    )


def _answer_scores(run: Run, gold: Mapping[str, tuple[str, ...]], advance: Callable[[int], None]) -> Scores:
    """Measures of answers, for questions with gold answers; none for a run that only retrieved."""
    if not gold or not (run.answers or run.failed == len(run.records)):
        return {}
    from telerag_cli.evaluation.answers import AnswerScores, score_answer

    found: Scores = {"exact_match": {}, "f1": {}, "contains_answer": {}}
    for key, answers in gold.items():
        answer = run.records[key].answer
        scored = AnswerScores(0.0, 0.0, 0.0) if answer is None else score_answer(answer, answers)
        for name, value in asdict(scored).items():
            found[name][key] = value
        advance(1)
    return found


def _by_answers(run: Run, gold: Mapping[str, tuple[str, ...]]) -> Judgements:
    """Judgements of what the run retrieved; none if it retrieved nothing, or not the texts."""
    passages = [passage for key in gold for passage in run.records[key].passages]
    if not passages or any(passage.text is None for passage in passages):
        return {}
    from telerag_cli.evaluation.answers import contains, normalized

    judgements: Judgements = {}
    for key, answers in gold.items():
        wanted = [normalized(answer) for answer in answers]
        judgements[trec_id(key)] = {
            trec_id(passage.id): int(contains(normalized(passage.text or ""), wanted))
            for passage in run.records[key].passages
        }
    return judgements


def _passage_scores(run: Run, judgements: Judgements, cutoffs: Sequence[int], *, complete: bool) -> Scores:
    """Measures of passages; none for a run that retrieved nothing at all."""
    if not judgements or not run.most_passages:
        return {}
    from telerag_cli.evaluation.passages import measures, score_passages

    records = [record for key, record in run.records.items() if trec_id(key) in judgements]
    return score_passages(records, judgements, measures(cutoffs, complete=complete))


def _compare(first: tuple[Run, Scores], second: tuple[Run, Scores], sampling: Sampling) -> Comparison:
    (run, scores), (other, others) = first, second
    both = [
        key
        for key, record in run.records.items()
        if key in other.records and not record.failed and not other.records[key].failed
    ]
    pairs = [(run.records[key], other.records[key]) for key in both]
    measures = {}
    for name in scores:
        shared = [key for key in both if key in scores[name] and key in others.get(name, {})]
        if shared:
            measures[name] = difference(
                [scores[name][key] for key in shared], [others[name][key] for key in shared], sampling
            )
    same_answers = sum(one.answer == two.answer for one, two in pairs)
    same_passages = sum(
        [passage.id for passage in one.passages] == [passage.id for passage in two.passages] for one, two in pairs
    )
    return Comparison(
        run.name,
        other.name,
        len(both),
        same_answers if run.answers and other.answers else None,
        same_passages if run.most_passages and other.most_passages else None,
        measures,
    )


def _notes(run: Run, result: RunResult, reference: Reference, deepest: int) -> list[str]:
    """What must be said of a run's figures; ``deepest`` is the highest cutoff that was asked for."""
    notes = []
    lines, name = result.lines, run.name
    by_answers = reference.judged_by is JudgedBy.ANSWERS
    if result.failed:
        notes.append(f"{name}: {result.failed:,} of {lines:,} lines failed; they count as wrong.")
    if result.missing:
        _, expected, told_by = reference.missing(run)
        notes.append(
            f"{name}: {len(result.missing):,} of the {expected:,} questions of {told_by} have no line and are left out: "
            f"{some(result.missing)}."
        )
    if result.without_gold and (run.answers or by_answers):
        what = "answers or passages" if by_answers and run.most_passages else "answers"
        notes.append(
            f"{name}: {result.without_gold:,} of {lines:,} lines have no gold answer and are left out of the measures "
            f"of {what}."
        )
    if not by_answers and result.unjudged and run.most_passages:
        notes.append(
            f"{name}: {result.unjudged:,} of {lines:,} lines have no relevant passage in the judgements and are left "
            "out of the measures of passages."
        )
    if by_answers and result.without_gold < lines and run.most_passages and "mrr" not in result.measures:
        notes.append(f"{name}: passages without their text cannot be judged by the answers; give --qrels.")
    if "mrr" in result.measures and deepest > run.most_passages:
        notes.append(
            f"{name}: it retrieved at most {run.most_passages:,} passages a question, so figures at {deepest:,} are "
            f"figures at {run.most_passages:,}."
        )
    if any(found.low is None for found in result.measures.values()):
        notes.append(f"{name}: fewer than {FEWEST} questions allow no interval and no verdict.")
    return notes
