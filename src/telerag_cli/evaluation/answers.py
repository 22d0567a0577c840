"""Scores of one answer as SQuAD's official evaluation script computes them (Rajpurkar et al., arXiv 1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class AnswerScores:
    """Scores of an answer, each in [0, 1]."""

    exact_match: float
    f1: float
    contains_answer: float


def normalized(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def contains(text: str, answers: Sequence[str]) -> bool:
    """Whether one of ``answers`` occurs in ``text`` as whole words. Both are normalised already."""
    padded = f" {text} "
    # An article alone normalises to nothing, which every text contains.
    return any(f" {answer} " in padded for answer in answers if answer)


def score_answer(answer: str, gold: Sequence[str]) -> AnswerScores:
    """Compare an answer with the gold answers, at least one; the best of them counts."""
    text, wanted = normalized(answer), [normalized(each) for each in gold]
    f1 = max(_f1(text.split(), each.split()) for each in wanted)
    return AnswerScores(float(text in wanted), f1, float(contains(text, wanted)))


def _f1(words: list[str], gold: list[str]) -> float:
    """``2PR / (P + R)`` of the words that both have, each as often as both have it."""
    if not words or not gold:
        return float(words == gold)
    shared = (Counter(words) & Counter(gold)).total()
    return 2 * shared / (len(words) + len(gold))
