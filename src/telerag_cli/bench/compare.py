"""Two results of the same suite side by side: what changed, and whether it is more than noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from telerag_cli.bench.report import COUNTS, Table, at, headline, ordered
from telerag_cli.bench.results import Cell, Key, SuiteResult, load_all
from telerag_cli.bench.wording import NONE, flattened, label, number, short, statistic, times
from telerag_cli.errors import ArtifactError, UsageError

QUANTILE = 1.96
"""Standard errors around the mean of a normal distribution that hold 95 % of it."""
ERRORS = {"mean": 1.0, "median": math.sqrt(math.pi / 2)}
"""The standard error of a statistic over that of the mean; the median's holds for normal data."""


Figures = dict[tuple[tuple[tuple[str, Any], ...], str, str], tuple[float, float | None]]
"""Values by key, system and metric, with the standard errors of their logarithms where these are known."""


class Verdict(StrEnum):
    """What may be said about a difference."""

    EQUAL = "equal"
    NOISE = "within the noise"
    DIFFERS = "differs"
    UNKNOWN = "no spread known"
    MISSING = "on one side only"


@dataclass(frozen=True)
class Change:
    """A metric of a cell, or a ratio, on both sides; None where a side has none."""

    key: Key
    system: str
    """``over ÷ under`` for a ratio."""
    metric: str
    a: float | None
    b: float | None
    ratio: float | None
    """``b / a``."""
    low: float | None
    """The lower end of the ratio's 95 % confidence interval, where both sides have a spread."""
    high: float | None
    verdict: Verdict


@dataclass(frozen=True)
class BenchComparison:
    """Two results of one suite."""

    suite: str
    title: str
    axes: list[str]
    differences: list[dict[str, Any]]
    """``name``, ``a`` and ``b`` of the hardware, settings and configurations that differ: what else may matter."""
    cells: list[Change]
    ratios: list[Change]


def compare_paths(first: Path, second: Path) -> tuple[list[BenchComparison], list[str]]:
    """Compare two result files, or all suites that two folders share; also return the results without a partner.

    Raises:
        ArtifactError: a path is missing or not a result, or the folders share no suite.
        UsageError: one is a file and the other a folder, or the files belong to different suites.
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
        a, b = SuiteResult.load(first), SuiteResult.load(second)
        if a.suite != b.suite:
            raise UsageError(
                f"{first.name} is a result of the suite {a.suite} and {second.name} of {b.suite}.",
                remedy="Compare results of one suite.",
            )
        return [compare(a, b)], []
    left, right = ordered(load_all(first)), load_all(second)
    pairs = _paired(left, right)
    if not pairs:
        suites = [", ".join(sorted({result.suite for result in results.values()})) for results in (left, right)]
        raise ArtifactError(
            f"{first} has results of {suites[0]} and {second} of {suites[1]}: there is nothing to compare.",
            remedy="Run the same suites for both.",
        )
    alone = [stem for stem in left if stem not in pairs] + [stem for stem in right if stem not in pairs.values()]
    return [compare(left[stem], right[pairs[stem]]) for stem in left if stem in pairs], alone


def _paired(left: Mapping[str, SuiteResult], right: Mapping[str, SuiteResult]) -> dict[str, str]:
    """Pair results by suite and file name, then those that are the only ones left of their suite on both sides."""
    pairs = {stem: stem for stem in left if stem in right and left[stem].suite == right[stem].suite}
    for suite in {result.suite for result in left.values()}:
        ones = [stem for stem, result in left.items() if result.suite == suite and stem not in pairs]
        others = [stem for stem, result in right.items() if result.suite == suite and stem not in pairs.values()]
        if len(ones) == len(others) == 1:
            pairs[ones[0]] = others[0]
    return pairs


def compare(first: SuiteResult, second: SuiteResult) -> BenchComparison:
    """Compare two results of one suite, cell by cell and ratio by ratio."""
    axes = list(dict.fromkeys([*first.axes, *second.axes]))
    shared = first.systems.keys() & second.systems.keys()
    a, b = (
        flattened(
            {
                "hardware": result.hardware,
                "settings": result.settings,
                "systems": {name: result.systems[name] for name in sorted(shared)},
            }
        )
        for result in (first, second)
    )
    differences = [
        {"name": name, "a": a.get(name), "b": b.get(name)}
        for name in dict.fromkeys([*a, *b])
        if a.get(name) != b.get(name)
    ]
    metrics = dict.fromkeys([*headline(first), *headline(second)])
    cells = _changes(_cell_figures(first, metrics), _cell_figures(second, metrics))
    ratios = _changes(_ratio_figures(first), _ratio_figures(second))
    return BenchComparison(first.suite, first.title, axes, differences, cells, ratios)


def _cell_figures(result: SuiteResult, metrics: Iterable[str]) -> Figures:
    return {
        (tuple(cell.key.items()), cell.system, metric): (value, _log_error(cell, metric, value))
        for cell in result.cells
        for metric in metrics
        if (value := number(cell.values.get(metric))) is not None
    }


def _ratio_figures(result: SuiteResult) -> Figures:
    return {
        (tuple(each.key.items()), f"{each.over} ÷ {each.under}", each.metric): (
            each.ratio,
            math.log(each.high / each.low) / (2 * QUANTILE) if 0 < each.low <= each.high else None,
        )
        for each in result.ratios
        if each.ratio is not None
    }


def _log_error(cell: Cell, metric: str, value: float) -> float | None:
    """Return the standard error of a value's logarithm, from the standard deviation beside it."""
    which, quantity = statistic(metric)
    spread, count = number(cell.values.get(f"std_{quantity}")), number(cell.values.get("completed"))
    if which not in ERRORS or spread is None or count is None or count < 2 or value <= 0:
        return None
    return ERRORS[which] * spread / math.sqrt(count) / value


def _changes(first: Figures, second: Figures) -> list[Change]:
    changes = []
    for place in dict.fromkeys([*first, *second]):
        key, system, metric = place
        a, a_error = first.get(place, (None, None))
        b, b_error = second.get(place, (None, None))
        quotient = b / a if a and b is not None else None
        low = high = None
        verdict = Verdict.EQUAL if a == b else Verdict.UNKNOWN
        if a is None or b is None:
            verdict = Verdict.MISSING
        if quotient and quotient > 0 and a_error is not None and b_error is not None:
            reach = QUANTILE * math.hypot(a_error, b_error)
            low, high = quotient * math.exp(-reach), quotient * math.exp(reach)
            if a != b:
                verdict = Verdict.NOISE if low <= 1 <= high else Verdict.DIFFERS
        if not (metric in COUNTS and a == b):
            changes.append(Change(dict(key), system, metric, a, b, quotient, low, high, verdict))
    return changes


def table(comparison: BenchComparison) -> Table:
    """Return a comparison as a table: cells, then ratios."""
    rows = []
    for changes, written in ((comparison.cells, short), (comparison.ratios, lambda _metric, value: times(value))):
        for change in changes:
            a, b = (NONE if value is None else written(change.metric, value) for value in (change.a, change.b))
            interval = NONE if change.low is None or change.high is None else f"{change.low:,.3f} to {change.high:,.3f}"
            quotient = NONE if change.ratio is None else f"{change.ratio:,.3f}"
            where = [at(change.key, axis) for axis in comparison.axes]
            rows.append([*where, change.system, change.metric, a, b, quotient, interval, change.verdict.value])
    heads = [*map(label, comparison.axes), "system", "metric"]
    return Table("", [*heads, "A", "B", "B/A", "95 % interval", "verdict"], rows, len(heads))
