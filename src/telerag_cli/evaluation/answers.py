"""Scores of one answer. What counts as the same text is decided by torchmetrics' SQuAD metric alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The normalisation has no public name. It is taken from there, as a copy could come to differ from the metric's own.
from torchmetrics.functional.text.squad import _normalize_text, squad

DECIMALS = 6
"""The metric computes in float32."""


@dataclass(frozen=True)
class AnswerScores:
    """Scores of an answer, each in [0, 1]."""

    exact_match: float
    f1: float
    contains_answer: float


def normalized(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    return str(_normalize_text(text))


def contains(text: str, answers: Sequence[str]) -> bool:
    """Whether one of ``answers`` stands in ``text`` as whole words. Both are normalised already."""
    padded = f" {text} "
    # An article alone normalises to nothing, which every text contains.
    return any(f" {answer} " in padded for answer in answers if answer)


def score_answer(answer: str, gold: Sequence[str]) -> AnswerScores:
    """Compare an answer with the gold answers; the best of them counts.

    Args:
        answer: the text.
        gold: at least one.
    """
    scores = squad(
        {"id": "", "prediction_text": answer}, {"id": "", "answers": {"text": list(gold), "answer_start": []}}
    )
    exact, f1 = (round(float(scores[name]) / 100, DECIMALS) for name in ("exact_match", "f1"))
    return AnswerScores(exact, f1, float(contains(normalized(answer), [normalized(each) for each in gold])))
