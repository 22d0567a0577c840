"""A report as one page of HTML: no script, no font and no picture from elsewhere; light and dark, on screen and paper."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2

from telerag_cli.bench import plots, tables
from telerag_cli.bench.plots import Drawing
from telerag_cli.bench.results import Check, SuiteResult
from telerag_cli.bench.tables import Table

TEMPLATE = "page.html.j2"
TITLE = "Benchmarks of telerag"
ALARM = ("#a32a1d", "#ff9a86")


@dataclass(frozen=True)
class Figure:
    """A drawing, and its panels as elements."""

    drawing: Drawing
    svgs: tuple[str, ...]


@dataclass(frozen=True)
class System:
    """How a system was configured."""

    name: str
    what: str
    configured: str


@dataclass(frozen=True)
class Section:
    """What the page says of one result."""

    id: str
    title: str
    result: SuiteResult
    begun: str
    took: str
    broken: tuple[Check, ...]
    figures: tuple[Figure, ...]
    headline: Table
    ratios: Table
    every: tuple[Table, ...]
    systems: tuple[System, ...]
    settings: tuple[tuple[str, str], ...]
    metadata: tuple[tuple[str, str], ...]
    kept: str
    """How many single requests the file has; empty if none."""


@dataclass(frozen=True)
class Machine:
    """What ran the suites ``measured``."""

    rows: tuple[tuple[str, str], ...]
    measured: tuple[str, ...]


def page(results: Mapping[str, SuiteResult], drawings: Mapping[str, Sequence[Drawing]]) -> str:
    """The whole page.

    Args:
        results: by file name without its ending, in order.
        drawings: of each; see `drawings_of`.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["parts"] = _parts
    template = environment.from_string(
        resources.files("telerag_cli.bench").joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    titles = tables.titles(results)
    ids = _ids(list(results))
    light, dark = (
        {
            **{name: pair[mode] for name, pair in plots.THEME.items()},
            **{f"s{slot}": pair[mode] for slot, pair in enumerate(plots.SERIES)},
            **{f"t{slot}": colour for slot, colour in enumerate(plots.STAGES)},
            "alarm": ALARM[mode],
        }
        for mode in (0, 1)
    )
    sections = [_section(ids[stem], titles[stem], result, drawings[stem]) for stem, result in results.items()]
    machines = [
        Machine(tuple(tables.described(hardware)), tuple(titles[stem] for stem in stems))
        for hardware, stems in tables.machines(results)
    ]
    return (
        template.render(
            title=TITLE,
            lead=tables.lead(results),
            light=light,
            dark=dark,
            overview=tables.overview(results),
            sections=sections,
            machines=machines,
        )
        + "\n"
    )


def _section(identity: str, title: str, result: SuiteResult, drawings: Sequence[Drawing]) -> Section:
    figures = tuple(
        Figure(
            drawing,
            tuple(plots.svg(panel, f"{identity}-{number}-{place}") for place, panel in enumerate(drawing.panels)),
        )
        for number, drawing in enumerate(drawings)
    )
    kept = sum(len(cell.detailed) for cell in result.cells)
    return Section(
        id=identity,
        title=title,
        result=result,
        begun=tables.moment(result.date),
        took=tables.took(result.took_s),
        broken=tuple(check for check in result.checks if not check.held),
        figures=figures,
        headline=tables.headline_table(result),
        ratios=tables.ratios_table(result),
        every=tuple(tables.every_figure(result)),
        systems=tuple(System(*told) for told in tables.configured(result)),
        settings=tuple(tables.described(result.settings)),
        metadata=tuple(tables.described(result.metadata)),
        kept=tables.plain(kept) if kept else "",
    )


def _ids(stems: Sequence[str]) -> dict[str, str]:
    """Names that a page's links may use, each once, whatever the files are called."""
    return {
        stem: f"suite-{number}-{re.sub(r'[^a-z0-9]+', '-', stem.lower()).strip('-')}"
        for number, stem in enumerate(stems, 1)
    }


def _parts(table: Table) -> list[list[tuple[str, ...]]]:
    """Rows that belong together; all of them if nothing does."""
    found = [list(rows) for _name, rows in itertools.groupby(table.rows, key=lambda row: row[: table.parts])]
    return found if any(len(rows) > 1 for rows in found) else [list(table.rows)]
