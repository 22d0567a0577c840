"""From measurements to figures: summaries by vLLM's names, and ratios with their confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from telerag_cli.bench.results import Key, Ratio

RESAMPLES = 2000
MIN_PAIRS = 3
WIDEST = 1.5
"""A ratio whose confidence interval has ends at least this many times apart is not told: the pairs do not agree."""

Pair = tuple[float, float]
"""What was measured over, and under, the same work."""


def summary(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and 99th percentile of values, and nothing of nothing.

    Their names are like vLLM's: ``mean_<name>``, ``p99_<name>``.
    """
    if not len(values):
        return {}
    return {
        f"mean_{name}": short(float(np.mean(values))),
        f"median_{name}": short(float(np.median(values))),
        f"std_{name}": short(float(np.std(values))),
        f"p99_{name}": short(float(np.percentile(values, 99))),
    }


def short(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")


def ratio(
    key: Key, over: str, under: str, metric: str, pairs: Sequence[Pair], *, seed: int = 0, widest: float = WIDEST
) -> Ratio:
    """How many times larger what was measured over is than what was measured under, pair by pair.

    The geometric mean of the pairs' ratios, with the 2.5 and 97.5 percentiles of `RESAMPLES` bootstrap samples of the
    pairs.

    Args:
        key: where it was measured.
        over: the system measured over.
        under: the system measured under.
        metric: what was divided.
        pairs: positive measurements.
        seed: of the samples.
        widest: interval, upper over lower end, from which on no number is given.
    """
    return mean_ratio(key, over, under, metric, [pairs], seed=seed, widest=widest)


def mean_ratio(
    key: Key,
    over: str,
    under: str,
    metric: str,
    groups: Sequence[Sequence[Pair]],
    *,
    seed: int = 0,
    widest: float = WIDEST,
) -> Ratio:
    """The geometric mean over groups, all of the same weight; pairs are resampled within their group. See `ratio`."""
    logs = [np.log([one / other for one, other in pairs]) for pairs in groups if len(pairs)]
    count = sum(map(len, logs))
    if not logs or min(map(len, logs)) < MIN_PAIRS:
        fewest = min(map(len, logs)) if logs else 0
        note = f"too few: {fewest} of the {MIN_PAIRS} pairs that are needed"
        return Ratio(key, over, under, metric, count, None, 0.0, 0.0, note)
    random = np.random.default_rng(seed)
    means = np.mean(
        [each[random.integers(len(each), size=(RESAMPLES, len(each)))].mean(axis=1) for each in logs], axis=0
    )
    low, high = np.exp(np.percentile(means, [2.5, 97.5])).tolist()
    middle = float(np.exp(np.mean([each.mean() for each in logs])))
    if high / low > widest:
        note = f"spread too wide: from {low:.2f} to {high:.2f} over {count} pairs"
        return Ratio(key, over, under, metric, count, None, short(low), short(high), note)
    return Ratio(key, over, under, metric, count, short(middle), short(low), short(high))


def pairs_of(over: Mapping[object, float], under: Mapping[object, float]) -> list[Pair]:
    """What both measured, by what it was measured on."""
    return [(over[work], under[work]) for work in over if work in under]
