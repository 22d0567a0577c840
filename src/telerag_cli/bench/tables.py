"""What a report says of a result in tables, and how it writes names and numbers; Markdown and the page render the same."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from telerag_cli.bench.results import Cell, Key, Ratio, SuiteResult
from telerag_cli.bench.suites import SuiteName
from telerag_cli.config import format_bytes

NONE = "\N{EN DASH}"
"""In the place of a figure that was not measured."""

MAX_COLUMNS = 6
"""Figures a row of the table that is shown first; all of them stand in the tables behind it."""

COUNTS = ("completed", "failed")
PREFERRED = (
    *COUNTS,
    "median_e2el_ms",
    "p99_e2el_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_retrieval_ms",
    "mean_retrieval_ms",
    "hit_share",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "mean_e2el_ms",
)
"""Shown first, in this order, where they were measured."""
LAST = ("duration", "total_input_tokens", "total_output_tokens")
"""Shown first only if there is nothing else."""
WORDS = ("bottleneck",)
"""Shown first, behind all figures, though they are none."""

_STATISTIC = re.compile(r"(mean|median|std|min|max|p\d+(?:\.\d+)?)_(.+)")
_QUANTITIES = {
    "e2el": "end to end",
    "ttft": "first token",
    "tpot": "per output token",
    "itl": "between tokens",
    "request_throughput": "requests/s",
    "request_goodput": "requests/s within the goals",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "tokens/s",
    "max_output_tokens_per_s": "most output tokens/s",
    "max_concurrent_requests": "most requests at once",
    "duration": "duration (s)",
    "stage": "time by stage",
    "wall": "wall time",
    "nprobe": "lists probed (nprobe)",
    "budget": "bytes moved, in multiples of the probed bytes",
    "batch_size": "batch size",
    "cache_fraction": "cache, as a share of fast memory",
    "request_rate": "request rate (1/s)",
    "speedup": "speed-up over one replica",
    "efficiency_share": "efficiency against one replica",
    "skew": "skew (Zipf exponent)",
}
_UNITS = {"_bytes_per_s": "B/s", "_per_s": "1/s", "_ms": "ms", "_s": "s"}


@dataclass(frozen=True)
class Column:
    """Of a table: a field's name, what stands at its head, and whether it holds figures."""

    name: str
    label: str
    figures: bool = True


@dataclass(frozen=True)
class Table:
    """Cells as they are to be read.

    The first ``heads`` columns say what a row is about; rows that agree in the first ``parts`` of them belong together.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    heads: int
    parts: int = 0


# Names and numbers.


def is_number(value: object) -> bool:
    """Whether it is a figure that can be drawn or divided: a finite number, and no yes or no."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: object) -> float | None:
    """The figure, or None if it is none."""
    return float(value) if is_number(value) else None  # type: ignore[arg-type]


def statistic(name: str) -> tuple[str, str]:
    """``("p99", "e2el_ms")`` for ``p99_e2el_ms``; the first is empty where a name has none."""
    found = _STATISTIC.fullmatch(name)
    return (found[1], found[2]) if found else ("", name)


def label(name: str) -> str:
    """A field's name in words: ``end to end, median (ms)`` for ``median_e2el_ms``."""
    if name in _QUANTITIES:
        return _QUANTITIES[name]
    which, quantity = statistic(name)
    quantity = quantity.removesuffix("_bytes") or quantity
    unit = next((ending for ending in _UNITS if quantity.endswith(ending)), "")
    stem = quantity.removesuffix(unit)
    words = _QUANTITIES.get(stem, stem.replace("_", " ").strip() or quantity)
    return words + (f", {which}" if which else "") + (f" ({_UNITS[unit]})" if unit else "")


def is_bytes(name: str) -> bool:
    """Whether a field is a number of bytes."""
    name = name.rpartition(".")[2]
    return name == "bytes" or name.endswith("_bytes") or (name.startswith("bytes_") and not name.endswith("_per_s"))


def is_time(name: str) -> bool:
    """Whether a field is a duration, so that less is better."""
    return name == "duration" or (name.endswith(("_ms", "_s")) and not name.endswith("_per_s"))


def is_share(name: str) -> bool:
    """Whether a field is a share of a whole, 0 to 1."""
    return name.endswith("_share") or name == "share"


def short(name: str, value: object) -> str:
    """A figure to be read: four digits, shares in per cent, bytes with their unit."""
    if (figure := number(value)) is None:
        return plain(value)
    if is_bytes(name):
        return format_bytes(figure)
    if is_share(name):
        return f"{100 * figure:.1f} %"
    return plain(value) if isinstance(value, int) else digits(figure, 4)


def column(name: str, values: Sequence[object]) -> list[str]:
    """Figures that stand below each other, to be read: as `short` has them, with the same places behind the point.

    As many as give the largest four digits, and the smallest two.
    """
    figures = [abs(figure) for value in values if (figure := number(value))]
    whole = all(isinstance(value, int) for value in values if number(value) is not None)
    if not figures or whole or is_bytes(name) or is_share(name):
        return [short(name, value) for value in values]
    places = max(3 - math.floor(math.log10(max(figures))), 1 - math.floor(math.log10(min(figures))), 0)
    return [plain(value) if number(value) is None else f"{value:,.{min(places, 6)}f}" for value in values]


def digits(figure: float, count: int) -> str:
    """So many significant digits, all of a whole part, no power of ten for what is not tiny."""
    if figure == 0:
        return "0"
    places = count - 1 - math.floor(math.log10(abs(figure)))
    if places > count + 4:
        return f"{figure:.{count - 1}e}"
    text = f"{round(figure, places):,.{max(places, 0)}f}" if places > 0 else f"{figure:,.0f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def times(ratio: float) -> str:
    """A ratio to be read: ``1.50``, ``12.3``; three digits, so that those of one table line up."""
    return f"{ratio:,.{max(0, min(4, 2 - math.floor(math.log10(ratio))))}f}" if ratio > 0 else plain(ratio)


def plain(value: object) -> str:
    """Any value as text: whole numbers in full, others to six digits, `NONE` for what is not there."""
    match value:
        case None:
            return NONE
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return "inf" if value == math.inf else digits(value, 6) if math.isfinite(value) else NONE
        case list() | tuple():
            return ", ".join(plain(each) for each in value) or "none"
        case dict():
            return ", ".join(f"{name} {plain(each)}" for name, each in value.items()) or "none"
    return str(value)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names; empty ones stay, so that nothing is lost."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
            flat |= flattened({str(index): each for index, each in enumerate(value, 1)}, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def described(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of nested tables, to be read; bytes with their unit and in full."""
    told = []
    for name, value in flattened(values).items():
        text = plain(value)
        if is_bytes(name) and is_number(value):
            text = f"{format_bytes(value)} ({text})"
        elif isinstance(value, int) and not isinstance(value, bool):
            text = text if value >= 10_000 else str(value)
        told.append((name, text))
    return told


# What a result holds.


def systems(result: SuiteResult) -> list[str]:
    """The names of all systems, in the order in which the cells have them."""
    named = [cell.system for cell in result.cells]
    named += [name for ratio in result.ratios for name in (ratio.over, ratio.under)]
    return list(dict.fromkeys([*named, *result.systems]))


def scalars(cells: Iterable[Cell]) -> list[str]:
    """Names of values that are no tables, in order of appearance."""
    return list(
        dict.fromkeys(name for cell in cells for name, value in cell.values.items() if not isinstance(value, dict))
    )


def stages(cells: Iterable[Cell], name: str) -> list[str]:
    """The columns of a value that is a table, in order of appearance."""
    return list(dict.fromkeys(stage for cell in cells for stage in table_of(cell, name)))


def headline(result: SuiteResult) -> list[str]:
    """The values to be shown first: those that everybody looks for, then what the suite has besides."""
    present = [
        name
        for name in scalars(result.cells)
        if any(number(cell.values.get(name)) is not None for cell in result.cells)
    ]
    chosen = [name for name in PREFERRED if name in present]
    chosen = [name for name in chosen if name.replace("mean_", "median_", 1) not in set(chosen) - {name}]
    others = [
        name
        for name in present
        if name not in chosen and name not in LAST and statistic(name)[0] in ("", "mean", "median")
    ]
    known = {statistic(name)[1] for name in chosen}
    chosen += [name for name in others if statistic(name)[1] not in known]
    chosen += [name for name in LAST if name in present]
    counts = [name for name in COUNTS if name in chosen]
    words = [name for name in WORDS if any(name in cell.values for cell in result.cells)]
    return counts + [name for name in chosen if name not in COUNTS][:MAX_COLUMNS] + words


def at(key: Key, axis: str) -> str:
    """Where a cell or ratio lies on an axis; one that does not name it is of all of it."""
    return short(axis, key[axis]) if axis in key else "all"


def table_of(cell: Cell, name: str) -> dict[str, Any]:
    """A value that is a table; empty if it is none."""
    value = cell.values.get(name)
    return value if isinstance(value, dict) else {}


def place(key: Key, axes: Sequence[str], *, named: bool = False) -> str:
    """``hyde, nq, cold``; empty if there are no axes. ``skew 0.6`` if numbers, which do not speak for themselves, are to be named."""
    names = [f"{axis.replace('_', ' ')} " if named and is_number(key.get(axis)) else "" for axis in axes]
    return ", ".join(name + at(key, axis) for name, axis in zip(names, axes, strict=True))


def why_none(ratio: Ratio) -> str:
    """In some words, why a ratio has no number."""
    return ratio.note.split(":")[0].strip() or "spread too wide"


def interval(ratio: Ratio) -> str:
    """``1.2 to 1.4``; `NONE` where there were too few pairs for one."""
    low, high = number(ratio.low), number(ratio.high)
    return f"{times(low)} to {times(high)}" if low and high else NONE


def simulated(cells: Iterable[Cell]) -> set[str]:
    """The systems whose figures were not measured but come from a simulation."""
    return {cell.system for cell in cells if cell.values.get("simulated") is True}


def has_failed(cell: Cell) -> bool:
    """Whether no request of a cell was completed."""
    return cell.values.get("completed") == 0


# Tables.


def headline_table(result: SuiteResult) -> Table:
    """A row a cell with what is to be shown first."""
    names = headline(result)
    if any(has_failed(cell) for cell in result.cells) and "completed" not in names:
        names = ["completed", *names]
    caption = "Main figures by system"
    columns = [column(name, [cell.values.get(name) for cell in result.cells]) for name in names]
    rows = [[shown[place] for shown in columns] for place in range(len(result.cells))]
    return _cells_table(
        caption, result, [Column(name, label(name), name not in WORDS) for name in names], rows, result.cells
    )


def ratios_table(result: SuiteResult) -> Table:
    """A row a ratio, with its interval or the reason why there is no number."""
    metrics = list(dict.fromkeys(ratio.metric for ratio in result.ratios))
    caption = "Ratios, pair by pair, with 95 % confidence intervals"
    if metrics and all(is_time(name) for name in metrics):
        caption += "; above 1, the second system takes less time"
    heads = [Column(axis, label(axis), figures=False) for axis in result.axes]
    heads += [
        Column("over", "first", figures=False),
        Column("under", "second", figures=False),
        Column("metric", "of", figures=False),
    ]
    rest = (Column("pairs", "pairs"), Column("ratio", "first ÷ second"), Column("interval", "95 % interval"))
    noted = any(ratio.note or ratio.ratio is None for ratio in result.ratios)
    rows = []
    for ratio in result.ratios:
        row = [at(ratio.key, axis) for axis in result.axes] + [
            ratio.over,
            ratio.under,
            ratio.metric,
            plain(ratio.pairs),
        ]
        row += [NONE if ratio.ratio is None else times(ratio.ratio), interval(ratio)]
        rows.append(tuple(row + ([ratio.note or (why_none(ratio) if ratio.ratio is None else "")] if noted else [])))
    columns = (*heads, *rest, *([Column("note", "why there is no number", figures=False)] if noted else []))
    return Table(caption, columns, tuple(rows), len(heads), len(result.axes))


def every_figure(result: SuiteResult) -> list[Table]:
    """All values of all cells under their own names: a table for each quantity, and one for what stands alone."""
    by_quantity: dict[str, list[str]] = {}
    for name in scalars(result.cells):
        by_quantity.setdefault(statistic(name)[1], []).append(name)
    alone = [names[0] for names in by_quantity.values() if len(names) == 1]
    tables = [_exact(result, "Single figures", alone)] if alone else []
    tables += [_exact(result, quantity, names) for quantity, names in by_quantity.items() if len(names) > 1]
    nested = dict.fromkeys(
        name for cell in result.cells for name, value in cell.values.items() if isinstance(value, dict)
    )
    for name in nested:
        cells = [cell for cell in result.cells if table_of(cell, name)]
        columns = stages(cells, name)
        rows = [[plain(table_of(cell, name).get(column)) for column in columns] for cell in cells]
        tables.append(_cells_table(name, result, [Column(each, each) for each in columns], rows, cells))
    return tables


def _exact(result: SuiteResult, caption: str, names: Sequence[str]) -> Table:
    cells = [cell for cell in result.cells if any(name in cell.values for name in names)]
    rows = [[plain(cell.values.get(name)) for name in names] for cell in cells]
    words = {name for name in names if any(isinstance(cell.values.get(name), str) for cell in cells)}
    return _cells_table(caption, result, [Column(name, name, name not in words) for name in names], rows, cells)


def _cells_table(
    caption: str, result: SuiteResult, columns: Sequence[Column], rows: Sequence[Sequence[str]], cells: Sequence[Cell]
) -> Table:
    heads = [Column(axis, label(axis), figures=False) for axis in result.axes] + [
        Column("system", "system", figures=False)
    ]
    full = [
        (*(at(cell.key, axis) for axis in result.axes), cell.system, *row)
        for cell, row in zip(cells, rows, strict=True)
    ]
    return Table(caption, (*heads, *columns), tuple(full), len(heads), len(result.axes))


# A whole report.


def ordered(results: Mapping[str, SuiteResult]) -> dict[str, SuiteResult]:
    """In the order in which the suites are declared, then by file name."""
    ranks = {name.value: rank for rank, name in enumerate(SuiteName)}
    return dict(sorted(results.items(), key=lambda item: (ranks.get(item[1].suite, len(ranks)), item[0])))


def titles(results: Mapping[str, SuiteResult]) -> dict[str, str]:
    """A heading for each; the file's name tells apart what has the same title."""
    given = [result.title for result in results.values()]
    return {
        stem: result.title if given.count(result.title) == 1 else f"{result.title} ({stem})"
        for stem, result in results.items()
    }


def machines(results: Mapping[str, SuiteResult]) -> list[tuple[dict[str, Any], list[str]]]:
    """Each machine, with its versions, and the file names of the results that it gave."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for stem, result in results.items():
        same = next((stems for hardware, stems in found if hardware == result.hardware), None)
        if same is None:
            found.append((result.hardware, [stem]))
        else:
            same.append(stem)
    return found


def overview(results: Mapping[str, SuiteResult]) -> Table:
    """A row a suite: how much was measured, and whether it may be believed."""
    columns = (
        Column("title", "suite", figures=False),
        Column("stands_for", "stands for", figures=False),
        Column("cells", "cells"),
        Column("failed", "cells failed"),
        Column("checks", "checks held"),
        Column("took", "took"),
    )
    names = titles(results)
    rows = tuple(
        (
            names[stem],
            result.stands_for,
            plain(len(result.cells)),
            plain(sum(map(has_failed, result.cells))),
            f"{sum(check.held for check in result.checks)} of {len(result.checks)}",
            took(result.took_s),
        )
        for stem, result in results.items()
    )
    return Table("What was measured", columns, rows, 1)


def took(seconds: float) -> str:
    """``2 h 5 min``, ``3 min 20 s``, ``4.2 s``."""
    if not math.isfinite(seconds) or seconds < 60:
        return f"{plain(round(seconds, 1)) if math.isfinite(seconds) else NONE} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def lead(results: Mapping[str, SuiteResult]) -> str:
    """In a sentence or two, what a report is of."""
    count, cells = len(results), sum(len(result.cells) for result in results.values())
    machines_count = len(machines(results))
    days = sorted({result.date[:10] for result in results.values()})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    broken = sum(not check.held for result in results.values() for check in result.checks)
    checks = sum(len(result.checks) for result in results.values())
    said = (
        f"{count} {'suite' if count == 1 else 'suites'}, {cells:,} {'measurement' if cells == 1 else 'measurements'} on "
        f"{machines_count} {'machine' if machines_count == 1 else 'machines'}, {when}."
    )
    if not checks:
        return said
    held = f"All {checks} checks held." if not broken else f"{broken} of {checks} checks did not hold."
    return f"{said} {'The one check held.' if checks == 1 and not broken else held}"


def configured(result: SuiteResult) -> list[tuple[str, str, str]]:
    """Of each system its name, the sentence that says what it is, and how it was configured."""
    names = [name for name in systems(result) if name in result.systems]
    told = []
    for name in names:
        values = result.systems[name]
        rest = {key: value for key, value in values.items() if key != "what"}
        told.append(
            (name, plain(values.get("what", "")), "; ".join(f"{key} {value}" for key, value in described(rest)))
        )
    return told


def moment(date: str) -> str:
    """``2026-05-04 10:20 UTC``; what is no ISO 8601 stays as it is."""
    try:
        then = datetime.fromisoformat(date)
    except ValueError:
        return date
    return then.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if then.tzinfo else then.strftime("%Y-%m-%d %H:%M")
