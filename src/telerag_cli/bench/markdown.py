"""A report as Markdown, with its plots as files beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from telerag_cli.bench import tables
from telerag_cli.bench.plots import Drawing
from telerag_cli.bench.results import SuiteResult
from telerag_cli.bench.tables import Table

TITLE = "# Benchmarks of telerag"


def markdown(results: Mapping[str, SuiteResult], plots: Mapping[str, Sequence[tuple[Drawing, str]]]) -> str:
    """The whole summary.

    Args:
        results: by file name without its ending, in order.
        plots: of each its drawings, with the names of the files that hold them.
    """
    titles = tables.titles(results)
    blocks = [TITLE, escaped(tables.lead(results)), table(tables.overview(results))]
    for stem, result in results.items():
        blocks += _suite(titles[stem], result, plots[stem])
    machines = tables.machines(results)
    blocks.append("## Machines" if len(machines) > 1 else "## Machine")
    for hardware, stems in machines:
        if len(machines) > 1:
            blocks.append(f"### {escaped(', '.join(titles[stem] for stem in stems))}")
        blocks.append(_pairs(tables.described(hardware)))
    return "\n\n".join(blocks) + "\n"


def _suite(title: str, result: SuiteResult, plots: Sequence[tuple[Drawing, str]]) -> list[str]:
    blocks = [
        f"## {escaped(title)}",
        f"Stands for {escaped(result.stands_for)}. Suite {code(result.suite)}, begun {escaped(tables.moment(result.date))}, "
        f"took {tables.took(result.took_s)}.",
    ]
    if broken := [check.name for check in result.checks if not check.held]:
        held = f"**{len(broken)} of {len(result.checks)} checks did not hold**, so these figures need care:"
        blocks.append(f"> {held} {escaped(', '.join(broken))}.")
    blocks += [f"![{escaped(drawing.alt)}]({quote(name)})" for drawing, name in plots]
    if not plots:
        blocks.append("Nothing was measured that could be drawn.")
    if result.cells:
        blocks.append(table(tables.headline_table(result)))
    if result.ratios:
        blocks.append(table(tables.ratios_table(result)))
    if result.checks:
        blocks += [
            "### Checks",
            "\n".join(
                f"- {'✓ held' if check.held else '✗ **not held**'}: **{escaped(check.name)}.** {escaped(check.says)}"
                for check in result.checks
            ),
        ]
    if result.notes:
        blocks += ["### Notes", "\n".join(f"- {escaped(note)}" for note in result.notes)]
    if result.systems:
        blocks += [
            "### Systems",
            "\n".join(
                f"- **{escaped(name)}**: {escaped(what)}" + (f" ({escaped(rest)})" if rest else "")
                for name, what, rest in tables.configured(result)
            ),
        ]
    if result.settings:
        blocks += ["### Settings, the same for all systems", _pairs(tables.described(result.settings))]
    if result.metadata:
        blocks += ["### Noted by the user", _pairs(tables.described(result.metadata))]
    blocks += ["### Command", fenced(result.command)]
    if result.cells:
        blocks += ["### Every figure", *(table(each) for each in tables.every_figure(result))]
    if kept := sum(len(cell.detailed) for cell in result.cells):
        blocks.append(f"The file keeps {tables.plain(kept)} single requests besides.")
    return blocks


def table(content: Table) -> str:
    """A table with its caption above it; figures to the right."""
    heads = [escaped(column.label) for column in content.columns]
    rules = ["---:" if column.figures else "---" for column in content.columns]
    lines = [heads, rules, *([escaped(cell) for cell in row] for row in content.rows)]
    return f"{escaped(content.caption)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Any text as Markdown that shows it as it is, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|\[\]$~])", r"\\\1", text)
    # Inside a word an underscore is one; at its ends it would be emphasis.
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return re.sub(r"^([#+-]|\d+[.)])(?=\s)", r"\\\1", text)


def code(text: str) -> str:
    """Text in backticks, more of them than it has itself."""
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"{ticks}{text}{ticks}"


def fenced(text: str) -> str:
    """Text as a block, fenced with more backticks than it has itself."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}sh\n{text}\n{ticks}"


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {escaped(name)} | {escaped(value)} |" for name, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines])
