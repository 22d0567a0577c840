"""Intervals by bootstrap: how far a mean over questions would move if other questions of the kind had been asked.

Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13 (the percentile interval). For pairs of runs,
Koehn, *Statistical significance tests for machine translation evaluation*, EMNLP 2004: the differences question by
question are what is drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
FEWEST = 6
"""With five questions, even if one run is better in every one, the sign test says 2 x 0.5 ** 5 = 6 %; with six, 3 %."""
BLOCK = 1 << 21
"""Draws made at a time, which bounds memory."""


@dataclass(frozen=True)
class Sampling:
    """How often is drawn, and from which seed."""

    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and the ends of its interval, which are None if there are too few questions to say."""

    value: float
    low: float | None
    high: float | None
    questions: int


@dataclass(frozen=True)
class Difference:
    """The mean of the second run's scores less the first's, over the questions that both answered."""

    value: float
    low: float | None
    high: float | None
    questions: int
    differs: bool | None
    """Whether the interval excludes 0; None if there is no interval."""


def estimate(scores: Sequence[float], sampling: Sampling) -> Estimate:
    """The mean of at least one score, with its interval."""
    low, high = _interval(np.asarray(scores, float), sampling)
    return Estimate(float(np.mean(scores)), low, high, len(scores))


def difference(first: Sequence[float], second: Sequence[float], sampling: Sampling) -> Difference:
    """How the second differs from the first; both have the same questions in the same order, at least one."""
    deltas = np.asarray(second, float) - np.asarray(first, float)
    low, high = _interval(deltas, sampling)
    differs = None if low is None or high is None else low > 0 or high < 0
    return Difference(float(deltas.mean()), low, high, len(deltas), differs)


def _interval(values: np.ndarray, sampling: Sampling) -> tuple[float, float] | tuple[None, None]:
    """The percentile interval of the mean; the same seed draws the same questions, whatever is measured on them."""
    if len(values) < FEWEST:
        return None, None
    generator = np.random.default_rng(sampling.seed)
    means = np.empty(sampling.resamples)
    rows = max(BLOCK // len(values), 1)
    for start in range(0, sampling.resamples, rows):
        drawn = generator.integers(0, len(values), (min(rows, sampling.resamples - start), len(values)))
        means[start : start + len(drawn)] = values[drawn].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
