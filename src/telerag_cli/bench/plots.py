"""What a report draws of each suite: bars with intervals, lines over an axis, and stacked stages."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from telerag_cli.bench.drawing import INK, MUTED, PAPER, Panel, Plot, tick, wrapped
from telerag_cli.bench.report import COUNTS, at, headline, why_none
from telerag_cli.bench.results import Cell, Key, SuiteResult
from telerag_cli.bench.suites import SuiteName
from telerag_cli.bench.wording import is_bytes, is_share, is_time, label, number, short, times
from telerag_cli.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")

LINES_IN = 3.1
"""Height of a panel of lines."""
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
BARS: dict[str, tuple[str, ...]] = {SuiteName.LATENCY: ("median_e2el_ms",)}
"""What is drawn as bars, a panel each; by default the first `SHOWN` main figures."""
SHOWN = 4


Looks = Mapping[str, tuple[str, str]]
"""The colour and the marker of each system of a report."""


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
    """Return the plots of a result; none of what was not measured.

    Args:
        result: the result of one suite.
        looks: how the systems look, see `looks_of`.
    """
    axis, metrics = LINES.get(result.suite, ("", ()))
    metrics = tuple(name for name in metrics if _values(result, name))
    if any("mean_stage_ms" in cell.values for cell in result.cells) and result.suite == SuiteName.BREAKDOWN:
        made = [_stacks(result, "mean_stage_ms")]
    elif metrics and len({cell.key.get(axis) for cell in result.cells}) > 1:
        made = [_lines(result, axis, metrics, looks)]
    else:
        names = metrics or BARS.get(result.suite) or tuple(name for name in headline(result) if name not in COUNTS)
        made = [_bars(result, [name for name in names if _values(result, name)][:SHOWN], looks)]
    ratios = [_ratios(result, metric, looks) for metric in dict.fromkeys(ratio.metric for ratio in result.ratios)]
    # The ratios of a comparison come first.
    made = [*ratios, *made] if result.suite == SuiteName.LATENCY else [*made, *ratios]
    return [plot for plot in made if plot.panels]


# Bars.


@dataclass(frozen=True)
class _Bar:
    system: str
    colour: str
    value: float | None
    says: str
    """Stands at the bar's end, or in its place."""
    interval: tuple[float, float] | None = None


def _bars(result: SuiteResult, metrics: Sequence[str], looks: Looks) -> Plot:
    """Draw values as bars, a panel for each metric and combination of the inner axes."""
    panels: list[Panel] = []
    for metric in metrics:
        scale, unit = _unit(metric, _values(result, metric))
        bars: list[tuple[Key, _Bar]] = []
        for cell in result.cells:
            value = number(cell.values.get(metric))
            says = short(metric, value) if value is not None else _why_missing(cell)
            bars.append((cell.key, _Bar(cell.system, looks[cell.system][0], value and value * scale, says)))
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
    bars: list[tuple[Key, _Bar]] = []
    for ratio in ratios:
        says = why_none(ratio) if ratio.ratio is None else times(ratio.ratio)
        interval = None if ratio.ratio is None else (ratio.low, ratio.high)
        bars.append((ratio.key, _Bar(ratio.under, looks[ratio.under][0], ratio.ratio, says, interval)))
    legend = {ratio.under: looks[ratio.under] for ratio in ratios}
    return Plot(f"ratio-{metric}", title, legend, _bar_panels(result, bars, f"{words}, ratio", reference=1.0))


def _bar_panels(
    result: SuiteResult, bars: Sequence[tuple[Key, _Bar]], words: str, *, heading: str = "", reference: float = 0.0
) -> list[Panel]:
    """Group bars by the outermost axis, and make a panel for each combination of the others, all with one scale."""
    across = result.axes[:1]
    most = max([reference, *(bar.value for _, bar in bars if bar.value is not None)]) or 1.0
    # An interval may be much longer than its bar, and must not turn all bars into stubs.
    limit = min(max([most, *(bar.interval[1] for _, bar in bars if bar.interval)]), 2.5 * most) * 1.18
    panels = []
    for where, inside in _by(bars, result.axes[1:]).items():
        if across:
            groups = {name: [bar for _, bar in some] for name, some in _by(inside, across).items()}
        else:
            groups = {bar.system: [bar] for _, bar in inside}
        told = "; ".join(_bars_in_words(name, group) for name, group in groups.items())
        title = ", ".join(filter(None, (heading, where)))
        height_in = 0.75 + 0.2 * max(len(inside) + 0.6 * (len(groups) - 1), 2)
        draw = _draw_bars(groups, limit, words, reference)
        panels.append(Panel(title, f"{title}: {told}." if title else f"{told}.", height_in, draw))
    return panels


def _bars_in_words(name: str, bars: Sequence[_Bar]) -> str:
    parts = []
    for bar in bars:
        said = bar.says if name == bar.system else f"{bar.system} {bar.says}"
        parts.append(said + (f" ({times(bar.interval[0])} to {times(bar.interval[1])})" if bar.interval else ""))
    return f"{name}: {', '.join(parts)}"


def _draw_bars(
    groups: Mapping[str, Sequence[_Bar]], limit: float, words: str, reference: float
) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
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

    return draw


def _draw_bar(axis: Axes, bar: _Bar, line: float, limit: float) -> None:
    # Where there is no value, a stub in the system's colour says whose it would be.
    length = limit * 0.006 if bar.value is None else bar.value
    axis.barh(line, length, height=0.82, color=bar.colour)
    if bar.interval:
        low, high = bar.interval
        error = [[max(length - low, 0.0)], [max(high - length, 0.0)]]
        for shade, width in ((PAPER, 2.6), (INK, 1.0)):
            axis.errorbar(
                length, line, xerr=error, color=shade, elinewidth=width, capsize=2.5, capthick=width, zorder=4
            )
        length = max(length, min(high, limit))
    axis.annotate(
        bar.says,
        (length, line),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        zorder=5,
        color=MUTED if bar.value is None else INK,
        style="italic" if bar.value is None else "normal",
        bbox={"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none"},  # hides the line at 1
    )


def _name_rows(axis: Axes, places: Sequence[float], names: Sequence[str], words: str) -> None:
    axis.set_yticks(places, [wrapped(name, 18) for name in names])
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=True, axis="x")
    axis.xaxis.set_major_formatter(tick)
    axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel(wrapped(words, 60))


# Stages.


def _stacks(result: SuiteResult, name: str) -> Plot:
    """Draw each cell as a bar of its stages, in the order in which they run."""

    def parts(cell: Cell) -> list[tuple[str, float]]:
        return list(cell.values.get(name, {}).items())

    free = itertools.count(2)
    legend: dict[str, tuple[str, str]] = {}
    for stage in dict.fromkeys(_family(stage) for cell in result.cells for stage, _ in parts(cell)):
        place = ("retrieval", "answer").index(stage) if stage in ("retrieval", "answer") else next(free)
        legend[stage] = (STAGES[place % len(STAGES)], "")
    limit = max(sum(value for _, value in parts(cell)) for cell in result.cells) * 1.14 or 1.0
    panels = []
    for where, inside in _by([(cell.key, cell) for cell in result.cells], result.axes).items():
        rows = {cell.system: parts(cell) for _, cell in inside}
        told = "; ".join(
            f"{system} " + (", ".join(f"{stage} {short(name, value)}" for stage, value in stages) or "not measured")
            for system, stages in rows.items()
        )
        draw = _draw_stacks(rows, legend, limit, label(name))
        panels.append(Panel(where, f"{where}: {told}.", 0.75 + 0.32 * max(len(rows), 1.5), draw))
    return Plot(name.replace("_", "-"), _capital(label(name)), legend, panels)


def _draw_stacks(
    rows: Mapping[str, Sequence[tuple[str, float]]], legend: Mapping[str, tuple[str, str]], limit: float, words: str
) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        for line, stages in enumerate(rows.values()):
            start = 0.0
            for stage, value in stages:
                bar = axis.barh(
                    line,
                    value,
                    left=start,
                    height=0.72,
                    color=legend[_family(stage)][0],
                    edgecolor=PAPER,
                    linewidth=0.7,
                )
                if value > limit * 0.016 * len(short("", value)):
                    axis.bar_label(bar, [short("", value)], label_type="center", fontsize=7)
                start += value
            says = short("", start) if stages else "not measured"
            axis.annotate(says, (start, line), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
        axis.set_xlim(0, limit)
        axis.set_ylim(len(rows) - 0.45, -0.55)
        _name_rows(axis, range(len(rows)), list(rows), words)

    return draw


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
        others = [axis for axis in result.axes if axis != over]
        for where, inside in _by([(cell.key, cell) for cell in result.cells], others).items():
            curves: dict[str, list[tuple[float, float]]] = {}
            told = []
            for _, cell in inside:
                x, y = number(cell.key.get(over)), number(cell.values.get(metric))
                said = _why_missing(cell) if y is None else short(metric, y)
                told.append(f"{cell.system} {said} at {at(cell.key, over)}")
                if x is not None and y is not None:
                    curves.setdefault(cell.system, []).append((x, scale * y))
            heading = ", ".join(filter(None, (_capital(label(metric)) if len(metrics) > 1 else "", where)))
            draw = _draw_lines(curves, looks, over, label(metric) + unit, limit)
            panels.append(Panel(heading, f"{heading or label(metric)}: {', '.join(told)}.", LINES_IN, draw))
    title = _capital(f"{' and '.join(map(label, metrics))} over {label(over)}")
    return Plot("curve", title, _legend(result, looks), panels, is_lines=True)


def _draw_lines(
    curves: Mapping[str, Sequence[tuple[float, float]]], looks: Looks, over: str, words: str, limit: float
) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
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
        axis.yaxis.set_major_formatter(tick)
        axis.set_xlabel(wrapped(label(over), 60))
        axis.set_ylabel(wrapped(words, 34))

    return draw


# What they share.


def _by(items: Sequence[tuple[Key, T]], axes: Sequence[str]) -> dict[str, list[tuple[Key, T]]]:
    """Group items by where they lie on some axes: ``hyde, cold``, or ``skew 1`` as numbers need their axis's name."""
    groups: dict[str, list[tuple[Key, T]]] = {}
    for key, item in items:
        names = (f"{axis.replace('_', ' ')} " if number(key.get(axis)) is not None else "" for axis in axes)
        where = ", ".join(name + at(key, axis) for name, axis in zip(names, axes, strict=True))
        groups.setdefault(where, []).append((key, item))
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
