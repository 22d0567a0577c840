"""What a report draws of each suite: bars with intervals, lines over an axis, and stacked stages."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from telerag_cli.bench.report import COUNTS, at, headline, why_none
from telerag_cli.bench.results import Cell, Key, SuiteResult
from telerag_cli.bench.suites import SuiteName
from telerag_cli.bench.wording import is_bytes, is_share, is_time, label, number, short, times
from telerag_cli.errors import needs_extra
from telerag_cli.files import writing
from telerag_cli.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")

PANEL_IN = 4.8
"""Width of a panel."""
LINES_IN = 3.1
"""Height of a panel of lines."""
DPI = 144
INK, MUTED, RULE, PAPER = "#1c1f23", "#59616a", "#d8dbd6", "#fdfdfb"
STYLE: Any = {
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that plots are the same everywhere
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
}
COLOURS = (
    *("#188ced", "#d77915", "#005e3d", "#6f297f", "#8b4c00", "#676c80"),
    *("#009dcb", "#640000", "#102233", "#0145ba", "#ae857a", "#7a8b00"),
)
"""At least 3:1 against the paper, and different for readers who do not see red or green."""
MARKERS = "os^DvPX*<>hp"
KNOWN = (
    *("refined", "question", "perfect", "faiss-memory", "faiss-ondisk", "fetch"),
    *("resident", "lancedb", "llm-only", "faiss-gpu", "useless", "arrival"),
)
"""Systems whose colours are the same in every report."""
STAGES = (
    *("#77aadd", "#ee9a7a", "#ecdc8b", "#55bf9f", "#f5aebb", "#9fdcf7"),
    *("#c3ce52", "#c9b8ea", "#b7a98c", "#cfd4d8", "#f0c040", "#e0a0e0"),
)
"""Light enough for dark words on them; ``retrieval`` and ``answer`` have the first two."""
LINES: dict[str, tuple[str, tuple[str, ...]]] = {
    SuiteName.NPROBE: ("nprobe", ("median_e2el_ms",)),
    SuiteName.HIT_RATE: ("budget", ("hit_share",)),
    SuiteName.THROUGHPUT: ("batch_size", ("request_throughput",)),
    SuiteName.SCALING: ("replicas", ("request_throughput", "efficiency_share")),
    SuiteName.CACHE: ("cache_fraction", ("hit_share", "median_join_ms")),
}
"""The axis of each suite that is drawn as lines, and what is drawn over it, a panel each."""
SHOWN = 4
"""Main figures that are drawn as bars, a panel each."""

Looks = Mapping[str, tuple[str, str]]
"""The colour and the marker of each system, or stage, by its name."""


@dataclass(frozen=True)
class Panel:
    """One set of axes, and the same in words."""

    title: str
    description: str
    height_in: float
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Plot:
    """One figure of a report: panels over one legend."""

    name: str
    title: str
    legend: Looks
    panels: Sequence[Panel]
    is_lines: bool = False

    @property
    def description(self) -> str:
        """What the plot shows, for readers who do not see it."""
        return " ".join([f"{self.title}.", *(panel.description for panel in self.panels)])

    def save(self, path: Path) -> None:
        """Draw the plot into a PNG; raises ResourceError if matplotlib is missing or the file cannot be written."""
        with needs_extra("bench", "A report"):
            import matplotlib
            from matplotlib.figure import Figure
            from matplotlib.lines import Line2D

        count = len(self.panels)
        columns = min(count, 2 if count <= 4 else 3)
        rows = -(-count // columns)
        heights = [
            max(panel.height_in for panel in self.panels[start : start + columns]) for start in range(0, count, columns)
        ]
        across = max(1, int(columns * PANEL_IN * 12 / (max(map(len, self.legend), default=1) + 6)))
        height = sum(heights) + 0.25 * rows + 0.25 * -(-len(self.legend) // across) + 0.4
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(columns * PANEL_IN, height), layout="constrained", facecolor=PAPER)
            grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
            for axis, panel in itertools.zip_longest(grid.flat, self.panels):
                if panel is None:
                    axis.set_axis_off()
                    continue
                panel.draw(axis)
                axis.set_axisbelow(True)
                axis.spines[["top", "right", "left"]].set_visible(False)
                axis.set_title(_wrapped(panel.title, 56), loc="left", fontsize=9, fontweight="bold")
            heading = _wrapped(self.title, int(columns * PANEL_IN * 10.5))
            figure.suptitle(heading, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
            shape: Any = {"linewidth": 1.6} if self.is_lines else {"linewidth": 0, "marker": "s"}
            handles = [
                Line2D([], [], **{"color": colour, "marker": marker, "markersize": 6} | shape)
                for colour, marker in self.legend.values()
            ]
            if handles:
                figure.legend(handles, list(self.legend), loc="outside lower left", ncols=across, frameon=False)
            with writing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=DPI)


def looks_of(results: Iterable[SuiteResult]) -> Looks:
    """Choose how each system looks in every plot of a report."""
    names = dict.fromkeys(
        name
        for result in results
        for name in [cell.system for cell in result.cells] + [each.under for each in result.ratios]
    )
    places = {name: KNOWN.index(name) for name in names if name in KNOWN}
    for name in names:
        if name not in places:
            places[name] = next(place for place in itertools.count() if place not in places.values())
    return {name: (COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]) for name, place in places.items()}


def plots_of(result: SuiteResult, looks: Looks) -> list[Plot]:
    """Return the plots of a result, without those of which nothing was measured."""
    axis, metrics = LINES.get(result.suite, ("", ()))
    metrics = tuple(name for name in metrics if _values(result, name))
    if any("mean_stage_ms" in cell.values for cell in result.cells) and result.suite == SuiteName.BREAKDOWN:
        made = [_stacks(result, "mean_stage_ms")]
    elif metrics and len({cell.key.get(axis) for cell in result.cells}) > 1:
        made = [_lines(result, axis, metrics, looks)]
    else:
        main = [name for name in headline(result) if name not in COUNTS]
        names = metrics or (["median_e2el_ms"] if result.suite == SuiteName.LATENCY else main)
        made = [_bars(result, [name for name in names if _values(result, name)][:SHOWN], looks)]
    ratios = [_ratios(result, metric, looks) for metric in dict.fromkeys(ratio.metric for ratio in result.ratios)]
    # The ratios of a comparison come first.
    made = [*ratios, *made] if result.suite == SuiteName.LATENCY else [*made, *ratios]
    return [plot for plot in made if plot.panels]


# Bars.


@dataclass(frozen=True)
class _Bar:
    key: Key
    system: str
    colour: str
    value: float | None
    says: str
    """Stands at the bar's end, or in its place."""
    interval: tuple[float, float] | None = None

    def described(self, group: str) -> str:
        """Return the bar in words, within a group of bars."""
        said = self.says if group == self.system else f"{self.system} {self.says}"
        return said + (f" ({times(self.interval[0])} to {times(self.interval[1])})" if self.interval else "")


def _bars(result: SuiteResult, metrics: Sequence[str], looks: Looks) -> Plot:
    """Draw values as bars, a panel for each metric and combination of the inner axes."""
    panels: list[Panel] = []
    for metric in metrics:
        scale, unit = _unit(metric, _values(result, metric))
        bars = []
        for cell in result.cells:
            value = number(cell.values.get(metric))
            says = short(metric, value) if value is not None else _why_missing(cell)
            bars.append(_Bar(cell.key, cell.system, looks[cell.system][0], value and value * scale, says))
        heading = _capital(label(metric)) if len(metrics) > 1 else ""
        panels += _bar_panels(result, bars, label(metric) + unit, heading=heading)
    title = _capital(label(metrics[0])) if len(metrics) == 1 else "Figures by system"
    name = "median" if result.suite == SuiteName.LATENCY else "bars"
    return Plot(name, title, _legend(result, looks) if result.axes else {}, panels)


def _ratios(result: SuiteResult, metric: str, looks: Looks) -> Plot:
    """Draw the ratios over the system that most others are compared with; other comparisons are in the table."""
    ratios = [ratio for ratio in result.ratios if ratio.metric == metric]
    baseline = Counter(ratio.over for ratio in ratios).most_common(1)[0][0]
    ratios = [ratio for ratio in ratios if ratio.over == baseline]
    words = label(metric).removesuffix(" (ms)")
    title = f"Speed-up over {baseline}: {words}" if is_time(metric) else f"{baseline}, divided by each system: {words}"
    bars = []
    for ratio in ratios:
        says = why_none(ratio) if ratio.ratio is None else times(ratio.ratio)
        interval = None if ratio.ratio is None else (ratio.low, ratio.high)
        bars.append(_Bar(ratio.key, ratio.under, looks[ratio.under][0], ratio.ratio, says, interval))
    legend = {ratio.under: looks[ratio.under] for ratio in ratios}
    return Plot(f"ratio-{metric}", title, legend, _bar_panels(result, bars, f"{words}, ratio", reference=1.0))


def _bar_panels(
    result: SuiteResult, bars: Sequence[_Bar], words: str, *, heading: str = "", reference: float = 0.0
) -> list[Panel]:
    """Group bars by the outermost axis, and make a panel for each combination of the others, all with one scale."""
    most = max([reference, *(bar.value for bar in bars if bar.value is not None)]) or 1.0
    # An interval may be much longer than its bar, and must not turn all bars into stubs.
    limit = min(max([most, *(bar.interval[1] for bar in bars if bar.interval)]), 2.5 * most) * 1.18
    panels = []
    for where, inside in _by(bars, result.axes[1:]).items():
        groups = _by(inside, result.axes[:1]) if result.axes else {bar.system: [bar] for bar in inside}
        told = "; ".join(f"{name}: {', '.join(bar.described(name) for bar in group)}" for name, group in groups.items())
        title = ", ".join(filter(None, (heading, where)))
        height_in = 0.75 + 0.2 * max(len(inside) + 0.6 * (len(groups) - 1), 2)
        draw = partial(_draw_bars, groups=groups, limit=limit, words=words, reference=reference)
        panels.append(Panel(title, f"{title}: {told}." if title else f"{told}.", height_in, draw))
    return panels


def _draw_bars(axis: Axes, groups: Mapping[str, Sequence[_Bar]], limit: float, words: str, reference: float) -> None:
    line, places = 0.0, []
    for bars in groups.values():
        places.append(line + (len(bars) - 1) / 2)
        for bar in bars:
            _draw_bar(axis, bar, line, limit)
            line += 1
        line += 0.6
    axis.set_xlim(0, limit)
    axis.set_ylim(line - 0.95, -0.65)
    _name_rows(axis, places, list(groups), words)
    if reference:
        axis.axvline(reference, color=INK, linewidth=1, zorder=3)


def _draw_bar(axis: Axes, bar: _Bar, line: float, limit: float) -> None:
    # Where there is no value, a stub in the system's colour says whose it would be.
    length = limit * 0.006 if bar.value is None else bar.value
    axis.barh(line, length, height=0.82, color=bar.colour)
    if bar.interval:
        low, high = bar.interval
        error = [[max(length - low, 0.0)], [max(high - length, 0.0)]]
        axis.errorbar(length, line, xerr=error, color=INK, elinewidth=1.0, capsize=2.5, zorder=4)
        length = max(length, min(high, limit))
    _note(axis, bar.says, length, line, color=MUTED if bar.value is None else INK)


def _note(axis: Axes, text: str, x: float, y: float, *, color: str = INK) -> None:
    """Write text to the right of a place, over whatever line is there."""
    box = {"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none"}
    place: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    axis.annotate(text, (x, y), fontsize=7.5, zorder=5, color=color, bbox=box, **place)


def _name_rows(axis: Axes, places: Sequence[float], names: Sequence[str], words: str) -> None:
    axis.set_yticks(places, [_wrapped(name, 18) for name in names])
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=True, axis="x")
    axis.xaxis.set_major_formatter(_tick)
    axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel(_wrapped(words, 60))


# Stages.


def _stacks(result: SuiteResult, name: str) -> Plot:
    """Draw each cell as a bar of its stages, in the order in which they run."""
    free = itertools.count(2)
    legend: dict[str, tuple[str, str]] = {}
    for stage in dict.fromkeys(_family(stage) for cell in result.cells for stage in cell.values.get(name, {})):
        place = ("retrieval", "answer").index(stage) if stage in ("retrieval", "answer") else next(free)
        legend[stage] = (STAGES[place % len(STAGES)], "")
    limit = max(sum(cell.values.get(name, {}).values()) for cell in result.cells) * 1.14 or 1.0
    panels = []
    for where, inside in _by(result.cells, result.axes).items():
        rows: dict[str, dict[str, float]] = {cell.system: cell.values.get(name, {}) for cell in inside}
        told = "; ".join(
            f"{system} "
            + (", ".join(f"{stage} {short(name, value)}" for stage, value in stages.items()) or "not measured")
            for system, stages in rows.items()
        )
        draw = partial(_draw_stacks, rows=rows, legend=legend, limit=limit, words=label(name))
        panels.append(Panel(where, f"{where}: {told}.", 0.75 + 0.32 * max(len(rows), 1.5), draw))
    return Plot(name.replace("_", "-"), _capital(label(name)), legend, panels)


def _draw_stacks(axis: Axes, rows: Mapping[str, Mapping[str, float]], legend: Looks, limit: float, words: str) -> None:
    for line, stages in enumerate(rows.values()):
        start = 0.0
        for stage, value in stages.items():
            look: Any = {"color": legend[_family(stage)][0], "edgecolor": PAPER, "linewidth": 0.7}
            bar = axis.barh(line, value, left=start, height=0.72, **look)
            if value > limit * 0.016 * len(short("", value)):
                axis.bar_label(bar, [short("", value)], label_type="center", fontsize=7)
            start += value
        _note(axis, short("", start) if stages else "not measured", start, line)
    axis.set_xlim(0, limit)
    axis.set_ylim(len(rows) - 0.45, -0.55)
    _name_rows(axis, range(len(rows)), list(rows), words)


def _family(stage: str) -> str:
    """Return the name that ``step_1`` and ``step_2`` share."""
    return re.sub(r"_\d+$", "", stage)


# Lines.


def _lines(result: SuiteResult, over: str, metrics: Sequence[str], looks: Looks) -> Plot:
    """Draw values over an axis, a line for each system, a panel for each metric and combination of the other axes."""
    panels = []
    for metric in metrics:
        values = _values(result, metric)
        scale, unit = _unit(metric, values)
        limit = 104.0 if is_share(metric) else 1.08 * scale * max(values) or 1.0
        for where, inside in _by(result.cells, [axis for axis in result.axes if axis != over]).items():
            curves: dict[str, list[tuple[float, float]]] = {}
            told = []
            for cell in inside:
                x, y = number(cell.key.get(over)), number(cell.values.get(metric))
                said = _why_missing(cell) if y is None else short(metric, y)
                told.append(f"{cell.system} {said} at {at(cell.key, over)}")
                if x is not None and y is not None:
                    curves.setdefault(cell.system, []).append((x, scale * y))
            heading = ", ".join(filter(None, (_capital(label(metric)) if len(metrics) > 1 else "", where)))
            words = label(metric) + unit
            draw = partial(_draw_lines, curves=curves, looks=looks, over=over, words=words, limit=limit)
            panels.append(Panel(heading, f"{heading or label(metric)}: {', '.join(told)}.", LINES_IN, draw))
    title = _capital(f"{' and '.join(map(label, metrics))} over {label(over)}")
    return Plot("curve", title, _legend(result, looks), panels, is_lines=True)


def _draw_lines(
    axis: Axes, curves: Mapping[str, Sequence[tuple[float, float]]], looks: Looks, over: str, words: str, limit: float
) -> None:
    for system, points in curves.items():
        xs, ys = zip(*sorted(points), strict=True)
        colour, marker = looks[system]
        axis.plot(xs, ys, color=colour, marker=marker, markersize=5, linewidth=1.6)
    places = sorted({x for points in curves.values() for x, _ in points})
    if places and all(place >= 1 and math.log2(place).is_integer() for place in places):
        axis.set_xscale("log", base=2)
    axis.set_xticks(places, [short(over, int(place) if place.is_integer() else place) for place in places])
    axis.set_xticks([], minor=True)
    axis.set_ylim(0, limit)
    axis.grid(visible=True)
    axis.yaxis.set_major_formatter(_tick)
    axis.set_xlabel(_wrapped(label(over), 60))
    axis.set_ylabel(_wrapped(words, 34))


# What they share.


def _by(items: Sequence[T], axes: Sequence[str]) -> dict[str, list[T]]:
    """Group cells or bars by their keys on some axes: ``hyde, cold``, or ``skew 1``, as numbers need their axis."""
    groups: dict[str, list[T]] = {}
    for item in items:
        key = item.key  # type: ignore[attr-defined]
        names = (f"{axis.replace('_', ' ')} " if number(key.get(axis)) is not None else "" for axis in axes)
        where = ", ".join(name + at(key, axis) for name, axis in zip(names, axes, strict=True))
        groups.setdefault(where, []).append(item)
    return groups


def _legend(result: SuiteResult, looks: Looks) -> Looks:
    return {cell.system: looks[cell.system] for cell in result.cells}


def _values(result: SuiteResult, name: str) -> list[float]:
    return [value for cell in result.cells if (value := number(cell.values.get(name))) is not None]


def _why_missing(cell: Cell) -> str:
    return "no request completed" if cell.values.get("completed") == 0 else "not measured"


def _unit(metric: str, values: Sequence[float]) -> tuple[float, str]:
    """Return what values are multiplied by to be drawn, and the unit in words: per cent, or that of the most bytes."""
    if is_share(metric):
        return 100.0, " (%)"
    if not is_bytes(metric):
        return 1.0, ""
    unit = format_bytes(max(values)).split()[1]
    return 1024.0 ** -("B", "KiB", "MiB", "GiB", "TiB").index(unit), f" ({unit})"


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=3, placeholder=" …"))


def _tick(value: float, _place: float) -> str:
    return f"{value:,.10g}"
