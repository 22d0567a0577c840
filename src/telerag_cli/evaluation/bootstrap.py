"""Bootstrap intervals: how far a mean over questions would move with other questions of the same kind.

Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13 (percentile interval). Pairs of runs are
compared by their differences question by question: Koehn, *Statistical significance tests for machine translation
evaluation*, EMNLP 2004.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
MIN_QUESTIONS = 6
"""With five questions, even if one run is better in every one, the sign test says 2 x 0.5 ** 5 = 6 %; with six, 3 %."""


@dataclass(frozen=True)
class Sampling:
    """Number of resamples, and their seed."""

    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and the ends of its interval, which are None with too few questions."""

    value: float
    low: float | None
    high: float | None
    questions: int


@dataclass(frozen=True)
class Difference(Estimate):
    """Mean of the second run's scores less the first's, over the questions that both answered."""

    differs: bool | None
    """Whether the interval excludes 0; None without an interval."""


def estimate(scores: Sequence[float], sampling: Sampling) -> Estimate:
    """Return the mean of at least one score, with its percentile interval.

    The same seed draws the same questions, whatever is measured on them.
    """
    values = np.asarray(scores, float)
    count = len(values)
    if count < MIN_QUESTIONS:
        return Estimate(float(values.mean()), None, None, count)
    generator = np.random.default_rng(sampling.seed)
    means = [values[generator.integers(0, count, count)].mean() for _ in range(sampling.resamples)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail]).tolist()
    return Estimate(float(values.mean()), low, high, count)


def difference(first: Sequence[float], second: Sequence[float], sampling: Sampling) -> Difference:
    """Compare the second with the first; both have the same questions in the same order, at least one."""
    found = estimate(np.asarray(second, float) - np.asarray(first, float), sampling)
    differs = None if found.low is None or found.high is None else found.low > 0 or found.high < 0
    return Difference(found.value, found.low, found.high, found.questions, differs)
