"""Two results of the same suite side by side: what changed, and whether it is more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from telerag_cli.bench import tables
from telerag_cli.bench.results import Cell, Key, Ratio, SuiteResult, load_all
from telerag_cli.bench.tables import number, statistic
from telerag_cli.errors import ArtifactError, UsageError

QUANTILE = 1.96
"""Of the normal distribution: 95 % lie within so many standard errors."""
ERRORS = {"mean": 1.0, "median": math.sqrt(math.pi / 2)}
"""Standard errors of a statistic, in those of the mean; that of the median is for normal data."""


class Verdict(StrEnum):
    """What may be said of a difference."""

    EQUAL = "equal"
    NOISE = "within the noise"
    DIFFERS = "differs"
    UNKNOWN = "no spread known"
    MISSING = "on one side only"


@dataclass(frozen=True)
class Difference:
    """Something besides the code that was not the same; None where one side has none."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Change:
    """A metric of a cell, or a ratio, on both sides."""

    key: Key
    system: str
    """For a ratio ``over ÷ under``."""
    metric: str
    first: float | None
    second: float | None
    quotient: float | None
    """Second over first."""
    low: float | None
    high: float | None
    """The ends of its 95 % confidence interval, where both sides have a spread."""
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """A suite, compared."""

    suite: str
    title: str
    axes: tuple[str, ...]
    differences: tuple[Difference, ...]
    """Hardware, versions, settings and configurations that differ: what else may have changed the figures."""
    cells: tuple[Change, ...]
    ratios: tuple[Change, ...]


def compare_paths(first: Path, second: Path) -> tuple[list[Comparison], list[str]]:
    """Compare two result files, or all suites that two folders share.

    Returns:
        The comparisons, and the names of results that have no partner.

    Raises:
        ArtifactError: a path is missing, or no result, or the folders share no suite.
        UsageError: one is a file and the other a folder, or the files are of different suites.
    """
    for path in (first, second):
        if not path.exists():
            raise ArtifactError(
                f"{path} does not exist.", remedy="Name a result of telerag bench, or a folder of them."
            )
    if first.is_dir() != second.is_dir():
        kinds = ["folder" if path.is_dir() else "file" for path in (first, second)]
        raise UsageError(
            f"{first} is a {kinds[0]} and {second} is a {kinds[1]}.", remedy="Name two files or two folders."
        )
    if not first.is_dir():
        return [compare(SuiteResult.load(first), SuiteResult.load(second), first.name, second.name)], []
    left, right = load_all(first), load_all(second)
    pairs, alone = _paired(left, right)
    if not pairs:
        suites = [", ".join(sorted({result.suite for result in results.values()})) for results in (left, right)]
        raise ArtifactError(
            f"{first} has results of {suites[0]} and {second} of {suites[1]}: there is nothing to compare.",
            remedy="Run the same suites for both.",
        )
    order = {stem: place for place, stem in enumerate(tables.ordered(left))}
    pairs.sort(key=lambda pair: order[pair[0]])
    return [compare(left[one], right[other], one, other) for one, other in pairs], alone


def _paired(
    left: Mapping[str, SuiteResult], right: Mapping[str, SuiteResult]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Results of one suite and one file name; then those that are the only ones left of their suite on both sides."""
    pairs = [(stem, stem) for stem in left if stem in right and left[stem].suite == right[stem].suite]
    rest = [[stem for stem in results if (stem, stem) not in pairs] for results in (left, right)]
    for suite in dict.fromkeys(left[stem].suite for stem in rest[0]):
        ones = [stem for stem in rest[0] if left[stem].suite == suite]
        others = [stem for stem in rest[1] if right[stem].suite == suite]
        if len(ones) == len(others) == 1:
            pairs.append((ones[0], others[0]))
    taken = [{pair[side] for pair in pairs} for side in (0, 1)]
    return pairs, [stem for side in (0, 1) for stem in rest[side] if stem not in taken[side]]


def compare(
    first: SuiteResult, second: SuiteResult, first_name: str = "the first", second_name: str = "the second"
) -> Comparison:
    """Compare two results cell by cell, ratio by ratio.

    Args:
        first: what to compare with.
        second: what is compared.
        first_name: for the error.
        second_name: for the error.

    Raises:
        UsageError: they are of different suites.
    """
    if first.suite != second.suite:
        raise UsageError(
            f"{first_name} is a result of the suite {first.suite} and {second_name} of {second.suite}.",
            remedy="Compare results of one suite.",
        )
    axes = tuple(dict.fromkeys([*first.axes, *second.axes]))
    return Comparison(
        first.suite,
        first.title,
        axes,
        tuple(_differences(first, second)),
        tuple(_cells(first, second)),
        tuple(_ratios(first, second)),
    )


def _differences(first: SuiteResult, second: SuiteResult) -> list[Difference]:
    both = [
        tables.flattened(
            {
                "hardware": result.hardware,
                "settings": result.settings,
                "systems": {
                    name: values
                    for name, values in result.systems.items()
                    if name in first.systems and name in second.systems
                },
            }
        )
        for result in (first, second)
    ]
    names = dict.fromkeys([*both[0], *both[1]])
    return [
        Difference(name, both[0].get(name), both[1].get(name))
        for name in names
        if both[0].get(name) != both[1].get(name)
    ]


def _cells(first: SuiteResult, second: SuiteResult) -> list[Change]:
    metrics = list(dict.fromkeys([*tables.headline(first), *tables.headline(second)]))
    left, right = ({(cell.system, _frozen(cell.key)): cell for cell in result.cells} for result in (first, second))
    changes = []
    for place in dict.fromkeys([*left, *right]):
        one, other = left.get(place), right.get(place)
        some = one or other
        assert some is not None
        for metric in metrics:
            values = [number(cell.values.get(metric)) if cell else None for cell in (one, other)]
            if values == [None, None] or (metric in tables.COUNTS and values[0] == values[1]):
                continue
            errors = [_log_error(cell, metric) if cell else None for cell in (one, other)]
            changes.append(_change(some.key, some.system, metric, values, errors))
    return changes


def _ratios(first: SuiteResult, second: SuiteResult) -> list[Change]:
    left, right = (
        {(ratio.over, ratio.under, ratio.metric, _frozen(ratio.key)): ratio for ratio in result.ratios}
        for result in (first, second)
    )
    changes = []
    for place in dict.fromkeys([*left, *right]):
        one, other = left.get(place), right.get(place)
        some = one or other
        assert some is not None
        values = [number(ratio.ratio) if ratio else None for ratio in (one, other)]
        if values != [None, None]:
            errors = [_log_error_of_ratio(ratio) if ratio else None for ratio in (one, other)]
            changes.append(_change(some.key, f"{some.over} ÷ {some.under}", some.metric, values, errors))
    return changes


def _change(key: Key, system: str, metric: str, values: list[float | None], errors: list[float | None]) -> Change:
    one, other = values
    if one is None or other is None:
        return Change(key, system, metric, one, other, None, None, None, Verdict.MISSING)
    quotient = other / one if one else None
    low = high = None
    verdict = Verdict.EQUAL if one == other else Verdict.UNKNOWN
    if quotient and quotient > 0 and errors[0] is not None and errors[1] is not None:
        reach = QUANTILE * math.hypot(errors[0], errors[1])
        low, high = quotient * math.exp(-reach), quotient * math.exp(reach)
        if one != other:
            verdict = Verdict.NOISE if low <= 1 <= high else Verdict.DIFFERS
    return Change(key, system, metric, one, other, quotient, low, high, verdict)


def _log_error(cell: Cell, metric: str) -> float | None:
    """The standard error of a value's logarithm, from the standard deviation beside it."""
    which, quantity = statistic(metric)
    value, spread = number(cell.values.get(metric)), number(cell.values.get(f"std_{quantity}"))
    count = number(cell.values.get("completed"))
    if which not in ERRORS or spread is None or count is None or count < 2 or value is None or value <= 0:
        return None
    return ERRORS[which] * spread / math.sqrt(count) / value


def _log_error_of_ratio(ratio: Ratio) -> float | None:
    """The standard error of a ratio's logarithm, from its interval."""
    low, high = number(ratio.low), number(ratio.high)
    return math.log(high / low) / (2 * QUANTILE) if low and high and 0 < low <= high else None


def _frozen(key: Key) -> tuple[tuple[str, str], ...]:
    """A key that can be looked up: 1 and 1.0 are the same place."""
    return tuple(
        sorted((name, str(float(value)) if tables.is_number(value) else str(value)) for name, value in key.items())
    )


# To be read.


def as_json(comparisons: list[Comparison], alone: list[str]) -> dict[str, Any]:
    """All of it as plain values."""
    return {"comparisons": [_suite(comparison) for comparison in comparisons], "unmatched": alone}


def _suite(comparison: Comparison) -> dict[str, Any]:
    return {
        "suite": comparison.suite,
        "differences": [{"name": each.name, "a": each.first, "b": each.second} for each in comparison.differences],
        "cells": [_plain(change) for change in comparison.cells],
        "ratios": [_plain(change) for change in comparison.ratios],
    }


def _plain(change: Change) -> dict[str, Any]:
    key = {name: "inf" if value == math.inf else value for name, value in change.key.items()}
    return {
        "key": key,
        "system": change.system,
        "metric": change.metric,
        "a": change.first,
        "b": change.second,
        "ratio": change.quotient,
        "low": change.low,
        "high": change.high,
        "verdict": change.verdict.value,
    }


COLUMNS = ("system", "metric", "A", "B", "B/A", "95 % interval", "verdict")


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Of `COLUMNS`, after one for each axis: cells, then ratios."""
    found = []
    for is_ratio, change in (
        (part is comparison.ratios, each) for part in (comparison.cells, comparison.ratios) for each in part
    ):
        shown = [
            tables.NONE if value is None else tables.times(value) if is_ratio else tables.short(change.metric, value)
            for value in (change.first, change.second)
        ]
        interval = (
            tables.NONE if change.low is None or change.high is None else f"{_fine(change.low)} to {_fine(change.high)}"
        )
        quotient = tables.NONE if change.quotient is None else _fine(change.quotient)
        where = [tables.at(change.key, axis) for axis in comparison.axes]
        found.append((*where, change.system, change.metric, *shown, quotient, interval, change.verdict.value))
    return found


def _fine(quotient: float) -> str:
    return f"{quotient:,.3f}"
