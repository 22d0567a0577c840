"""Reports of benchmarks: one Markdown file and its plots, made from a folder of results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from telerag_cli.bench import wording
from telerag_cli.bench.results import Cell, Ratio, SuiteResult, load_all
from telerag_cli.bench.suites import SuiteName
from telerag_cli.bench.wording import NONE, described, duration, is_time, label, number, plain, short, statistic, times
from telerag_cli.errors import ResourceError
from telerag_cli.files import wrap_os_error, writing

SUMMARY = "report.md"
MAX_COLUMNS = 6
"""Figures in a row of the main table; the tables at the end have all of them."""
COUNTS = ("completed", "failed")
PREFERRED = (
    "median_e2el_ms",
    "p99_e2el_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_retrieval_ms",
    "hit_share",
    "request_throughput",
    "output_throughput",
)
"""Shown first, in this order, where they were measured."""
LAST = ("duration",)
"""Shown in the main table only where there is room left."""


@dataclass(frozen=True)
class Table:
    """A table in words: the first ``heads`` columns say what a row is about, the others hold figures."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    heads: int


def write(folder: Path, output: Path, advance: Callable[[int], None] = lambda _count: None) -> list[Path]:
    """Write `SUMMARY` and a PNG for each plot, and return their paths, the summary first; other files stay.

    Raises:
        ArtifactError: the folder has no result, or one of them is damaged.
        ResourceError: matplotlib is missing, or the output cannot be written.
    """
    from telerag_cli.bench.plots import looks_of, plots_of

    results = ordered(load_all(folder))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ResourceError(
            f"{output} is a file, and a report is a folder of files.", remedy="Name another with -o."
        ) from error
    except OSError as error:
        raise wrap_os_error(error, output) from error
    looks = looks_of(results.values())
    images: dict[str, list[tuple[str, str]]] = {}
    written = []
    for stem, result in results.items():
        images[stem] = []
        for plot in plots_of(result, looks):
            name = f"{stem}-{plot.name}.png"
            plot.save(output / name)
            images[stem].append((plot.description, name))
            written.append(output / name)
            advance(1)
    with writing(output / SUMMARY) as temporary:  # last, so that it names no plot that is missing
        temporary.write_text(markdown(results, images), encoding="utf-8")
    advance(1)
    return [output / SUMMARY, *written]


def ordered(results: Mapping[str, SuiteResult]) -> dict[str, SuiteResult]:
    """Sort results by the order of the suites, then by file name."""
    ranks = {name.value: rank for rank, name in enumerate(SuiteName)}
    return dict(sorted(results.items(), key=lambda item: (ranks.get(item[1].suite, len(ranks)), item[0])))


# Tables.


def headline(result: SuiteResult) -> list[str]:
    """Return the names of the values to show first: those that most readers look for, then the suite's own."""
    scalars = dict.fromkeys(
        name for cell in result.cells for name, value in cell.values.items() if number(value) is not None
    )
    chosen = [name for name in PREFERRED if name in scalars]
    for name in scalars:
        which, quantity = statistic(name)
        if name in (*COUNTS, *LAST) or which not in ("", "mean", "median"):
            continue
        if quantity not in {statistic(each)[1] for each in chosen}:
            chosen.append(name if which != "mean" or f"median_{quantity}" not in scalars else f"median_{quantity}")
    chosen += [name for name in LAST if name in scalars]
    return [name for name in COUNTS if name in scalars] + chosen[:MAX_COLUMNS]


def headline_table(result: SuiteResult) -> Table:
    """Return the main figures, a row for each cell."""
    names = headline(result)
    shown = [wording.column(name, [cell.values.get(name) for cell in result.cells]) for name in names]
    rows = [list(row) for row in zip(*shown, strict=True)] or [[] for _ in result.cells]
    return _cells_table("Main figures by system", result, [label(name) for name in names], result.cells, rows)


def ratios_table(result: SuiteResult) -> Table:
    """Return the ratios with their intervals, or the reason why there is no number."""
    caption = "Ratios, pair by pair, with 95 % confidence intervals"
    if result.ratios and all(is_time(ratio.metric) for ratio in result.ratios):
        caption += "; above 1, the second system takes less time"
    rows = [
        [at(ratio.key, axis) for axis in result.axes]
        + [ratio.over, ratio.under, ratio.metric, plain(ratio.pairs)]
        + [why_none(ratio) if ratio.ratio is None else times(ratio.ratio)]
        + [f"{times(ratio.low)} to {times(ratio.high)}" if ratio.low and ratio.high else NONE]
        for ratio in result.ratios
    ]
    heads = [*map(label, result.axes), "first", "second", "of"]
    return Table(caption, [*heads, "pairs", "first ÷ second", "95 % interval"], rows, len(heads))


def at(key: Mapping[str, Any], axis: str) -> str:
    """Return where a cell or ratio lies on an axis; ``all`` if it is about the whole axis."""
    return short(axis, key[axis]) if axis in key else "all"


def why_none(ratio: Ratio) -> str:
    """Return in a few words why a ratio has no number."""
    return ratio.note.split(":")[0].strip() or "spread too wide"


def _cells_table(
    caption: str, result: SuiteResult, names: Sequence[str], cells: Sequence[Cell], rows: Sequence[Sequence[str]]
) -> Table:
    heads = [*map(label, result.axes), "system"]
    full = [
        [*(at(cell.key, axis) for axis in result.axes), cell.system, *row]
        for cell, row in zip(cells, rows, strict=True)
    ]
    return Table(caption, [*heads, *names], full, len(heads))


def _every_figure(result: SuiteResult) -> list[Table]:
    """Return all values under their own names: a table for each quantity and nested value, and one for the rest."""
    quantities: dict[str, list[str]] = {}
    nested: dict[str, list[str]] = {}
    for name, value in ((name, value) for cell in result.cells for name, value in cell.values.items()):
        if isinstance(value, dict):
            nested[name] = list(dict.fromkeys([*nested.get(name, []), *value]))
        elif name not in (names := quantities.setdefault(statistic(name)[1], [])):
            names.append(name)
    groups = {"Single figures": [names[0] for names in quantities.values() if len(names) == 1]}
    groups |= {quantity: names for quantity, names in quantities.items() if len(names) > 1}
    tables = []
    for caption, names in [*groups.items(), *nested.items()]:
        values = {id(cell): cell.values.get(caption, {}) if caption in nested else cell.values for cell in result.cells}
        cells = [cell for cell in result.cells if any(name in values[id(cell)] for name in names)]
        rows = [[plain(values[id(cell)].get(name)) for name in names] for cell in cells]
        tables.append(_cells_table(caption, result, names, cells, rows))
    return [table for table in tables if table.rows]


# Markdown.


def markdown(results: Mapping[str, SuiteResult], images: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Return the whole report, from results and their plots' descriptions and file names, by the results' own."""
    given = [result.title for result in results.values()]
    titles = {
        stem: result.title if given.count(result.title) == 1 else f"{result.title} ({stem})"
        for stem, result in results.items()
    }
    blocks = ["# Benchmarks of telerag", _lead(results), _table(_overview(results, titles))]
    for stem, result in results.items():
        blocks += _suite(stem, titles[stem], result, images[stem])
    machines = _machines(results)
    blocks.append("## Machines" if len(machines) > 1 else "## Machine")
    for hardware, stems in machines:
        if len(machines) > 1:
            blocks.append(f"### {escaped(', '.join(titles[stem] for stem in stems))}")
        blocks.append(_pairs(hardware))
    return "\n\n".join(blocks) + "\n"


def _suite(stem: str, title: str, result: SuiteResult, images: Sequence[tuple[str, str]]) -> list[str]:
    begun = datetime.fromisoformat(result.date).astimezone(UTC)
    blocks = [
        f"## {escaped(title)}",
        f"Stands for {escaped(result.stands_for)}. Suite `{escaped(result.suite)}`, "
        f"begun {begun.strftime('%Y-%m-%d %H:%M UTC')}, took {duration(result.took_s)}.",
    ]
    if broken := [check.name for check in result.checks if not check.held]:
        held = f"**{len(broken)} of {len(result.checks)} checks did not hold**, so these figures need care:"
        blocks.append(f"> {held} {escaped(', '.join(broken))}.")
    blocks += [f"![{escaped(description)}]({quote(name)})" for description, name in images]
    if not images:
        blocks.append("Nothing was measured that could be drawn.")
    blocks += [_table(table) for table in (headline_table(result), ratios_table(result)) if table.rows]
    checks = [
        f"{'✓ held' if check.held else '✗ **not held**'}: **{escaped(check.name)}.** {escaped(check.says)}"
        for check in result.checks
    ]
    systems = [f"**{escaped(name)}**: {escaped(_configured(values))}" for name, values in result.systems.items()]
    for heading, lines in (("Checks", checks), ("Notes", [*map(escaped, result.notes)]), ("Systems", systems)):
        if lines:
            blocks += [f"### {heading}", "\n".join(f"- {line}" for line in lines)]
    for heading, values in (
        ("Settings, the same for all systems", result.settings),
        ("Noted by the user", result.metadata),
    ):
        if values:
            blocks += [f"### {heading}", _pairs(values)]
    blocks += ["### Command", fenced(result.command)]
    if every := _every_figure(result):
        kept = sum(len(cell.detailed) for cell in result.cells)
        blocks.append(f"<details><summary>Every figure of {escaped(stem)}.json</summary>")
        blocks += map(_table, every)
        blocks += [f"The file keeps {kept:,} single requests besides."] if kept else []
        blocks.append("</details>")
    return blocks


def _lead(results: Mapping[str, SuiteResult]) -> str:
    counts = {
        "suite": len(results),
        "measurement": sum(len(result.cells) for result in results.values()),
        "machine": len(_machines(results)),
    }
    suites, cells, machines = (f"{count:,} {word}{'' if count == 1 else 's'}" for word, count in counts.items())
    days = sorted({result.date[:10] for result in results.values()})
    when = " to ".join(dict.fromkeys([days[0], days[-1]]))
    checks = [check.held for result in results.values() for check in result.checks]
    held = "All checks held." if all(checks) else f"{checks.count(False)} of {len(checks)} checks did not hold."
    return f"{suites}, {cells} on {machines}, {when}. {held if checks else ''}".strip()


def _overview(results: Mapping[str, SuiteResult], titles: Mapping[str, str]) -> Table:
    rows = [
        [
            titles[stem],
            result.stands_for,
            plain(len(result.cells)),
            plain(sum(cell.values.get("completed") == 0 for cell in result.cells)),
            f"{sum(check.held for check in result.checks)} of {len(result.checks)}",
            duration(result.took_s),
        ]
        for stem, result in results.items()
    ]
    columns = ["suite", "stands for", "cells", "cells failed", "checks held", "took"]
    return Table("What was measured", columns, rows, 2)


def _machines(results: Mapping[str, SuiteResult]) -> list[tuple[dict[str, Any], list[str]]]:
    """Return each machine with its versions, and the file names of the results measured on it."""
    machines = [result.hardware for result in results.values()]
    different = [machine for place, machine in enumerate(machines) if machine not in machines[:place]]
    return [
        (machine, [stem for stem, result in results.items() if result.hardware == machine]) for machine in different
    ]


def _configured(values: Mapping[str, Any]) -> str:
    rest = "; ".join(f"{name} {value}" for name, value in described(values) if name != "what")
    return f"{values.get('what', '')}{f' ({rest})' if rest else ''}"


def _table(table: Table) -> str:
    rules = ["---" if place < table.heads else "---:" for place in range(len(table.columns))]
    rows = [[escaped(cell) for cell in row] for row in (table.columns, *table.rows)]
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], rules, *rows[1:])]
    return f"{escaped(table.caption)}\n\n" + "\n".join(lines)


def _pairs(values: Mapping[str, Any]) -> str:
    lines = [f"| {escaped(name)} | {escaped(value)} |" for name, value in described(values)]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def escaped(text: str) -> str:
    """Return any text as Markdown that shows it as it is, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|\[\]$~])", r"\\\1", text)
    # Inside a word an underscore is one; at its ends it would be emphasis.
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return re.sub(r"^([#+-]|\d+[.)])(?=\s)", r"\\\1", text)


def fenced(text: str) -> str:
    """Return text as a block, fenced with more backticks than it contains."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}sh\n{text}\n{ticks}"
