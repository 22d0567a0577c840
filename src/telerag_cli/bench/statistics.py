"""From measurements to figures: summaries by vLLM's names, and ratios with their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from telerag_cli.bench.results import Key, Ratio

RESAMPLES = 2000
MIN_PAIRS = 3
WIDEST = 1.5
"""A ratio has no number if the ends of its confidence interval are at least this many times apart."""

Pair = tuple[float, float]
"""What was measured over, and under, the same work; both are positive."""


def summary(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return mean, median, standard deviation and 99th percentile under vLLM's names, and nothing of no values."""
    if not len(values):
        return {}
    return {
        f"mean_{name}": short(float(np.mean(values))),
        f"median_{name}": short(float(np.median(values))),
        f"std_{name}": short(float(np.std(values))),
        f"p99_{name}": short(float(np.percentile(values, 99))),
    }


def short(value: float) -> float:
    """Round to five significant digits."""
    return float(f"{value:.5g}")


def ratio(key: Key, over: str, under: str, metric: str, pairs: Sequence[Pair], *, seed: int = 0) -> Ratio:
    """Return how many times larger what was measured over is than what was measured under, pair by pair.

    It is the geometric mean of the pairs' ratios, with the 2.5 and 97.5 percentiles of `RESAMPLES` bootstrap samples of
    the pairs.
    """
    return mean_ratio(key, over, under, metric, [pairs], seed=seed)


def mean_ratio(
    key: Key, over: str, under: str, metric: str, groups: Sequence[Sequence[Pair]], *, seed: int = 0
) -> Ratio:
    """Return the geometric mean over groups of equal weight; pairs are resampled within their group. See `ratio`."""
    logs = [np.log([one / other for one, other in pairs]) for pairs in groups if len(pairs)]
    count, fewest = sum(map(len, logs)), min(map(len, logs), default=0)
    if fewest < MIN_PAIRS:
        note = f"too few: {fewest} of the {MIN_PAIRS} pairs that are needed"
        return Ratio(key, over, under, metric, count, None, 0.0, 0.0, note)
    random = np.random.default_rng(seed)
    means = np.mean(
        [each[random.integers(len(each), size=(RESAMPLES, len(each)))].mean(axis=1) for each in logs], axis=0
    )
    low, high = np.exp(np.percentile(means, [2.5, 97.5])).tolist()
    if high / low > WIDEST:
        note = f"spread too wide: from {low:.2f} to {high:.2f} over {count} pairs"
        return Ratio(key, over, under, metric, count, None, short(low), short(high), note)
    middle = float(np.exp(np.mean([each.mean() for each in logs])))
    return Ratio(key, over, under, metric, count, short(middle), short(low), short(high))
