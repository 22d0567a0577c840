"""What is drawn of each suite: its plots as data, which `telerag_cli.bench.plots` puts on paper."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from telerag_cli.bench import plots, tables
from telerag_cli.bench.plots import (
    LINES_IN,
    STYLES,
    Bar,
    Curve,
    Drawing,
    Entry,
    Panel,
    Row,
    bar_entry,
    line_entry,
    stage_entry,
)
from telerag_cli.bench.results import Cell, Key, Ratio, SuiteResult
from telerag_cli.bench.suites import SuiteName, SystemName
from telerag_cli.bench.tables import is_bytes, is_number, is_share, is_time, label, number, short, statistic
from telerag_cli.config import format_bytes

T = TypeVar("T")

KEPT_SLOTS = {
    SystemName.REFINED: 0,
    SystemName.QUESTION: 1,
    SystemName.PERFECT: 2,
    SystemName.FAISS_MEMORY: 3,
    SystemName.FAISS_ONDISK: 4,
    SystemName.FETCH: 5,
    SystemName.RESIDENT: 6,
    SystemName.LANCEDB: 7,
    SystemName.LLM_ONLY: 8,
    SystemName.FAISS_GPU: 9,
    SystemName.USELESS: 10,
    "hotness": 0,
    "lru": 1,
    "frequency": 2,
    "none": 5,
}
"""Colours of systems that many reports have, so that these agree with each other; whoever comes second takes a free one."""

FIRST_STAGES = ("retrieval", "answer")
"""What all pipelines have takes the first of them."""


@dataclass(frozen=True)
class Lines:
    """A suite that is drawn as lines over an axis, one for each system."""

    axis: str
    metrics: tuple[str, ...]
    """A panel each."""
    doubling: bool = True
    """Whether the axis goes in powers of two."""
    instead: tuple[str, ...] = ()
    """What to draw if no cell has any of them."""


LINES = {
    SuiteName.NPROBE: Lines("nprobe", ("median_e2el_ms",), instead=("mean_e2el_ms",)),
    SuiteName.HIT_RATE: Lines("budget", ("hit_share",), doubling=False),
    SuiteName.THROUGHPUT: Lines("batch_size", ("request_throughput",), instead=("output_throughput",)),
    SuiteName.SCALING: Lines("replicas", ("request_throughput", "efficiency_share"), instead=("output_throughput",)),
    SuiteName.CACHE: Lines("cache_fraction", ("hit_share", "median_e2el_ms", "median_join_ms"), doubling=False),
}
STAGE_TABLES = ("mean_stage_ms", "median_stage_ms")
BARS = (SuiteName.EMBED, SuiteName.BUILD)
LATENCIES = ("median_e2el_ms", "mean_e2el_ms")
SERVED = ("ttft_ms", "e2el_ms")
SHOWN_METRICS = 4
"""Panels of a suite that has no plot of its own."""


def slots(results: Iterable[SuiteResult]) -> dict[str, int]:
    """A number for each system of a report, which is its colour in every plot of it."""
    names = list(dict.fromkeys(name for result in results for name in tables.systems(result)))
    taken: dict[str, int] = {}
    for name in names:
        if (kept := KEPT_SLOTS.get(name)) is not None and kept not in taken.values():
            taken[name] = kept
    for name in names:
        if name not in taken:
            taken[name] = next(slot for slot in itertools.count() if slot not in taken.values())
    return {name: taken[name] for name in names}


def drawings_of(result: SuiteResult, of_systems: Mapping[str, int]) -> list[Drawing]:
    """What there is to draw of a result; nothing for what was not measured.

    Args:
        result: of one suite.
        of_systems: see `slots`.
    """
    made: list[Drawing | None] = []
    if result.suite == SuiteName.BREAKDOWN:
        made += [_stacked(result, name) for name in STAGE_TABLES]
    elif result.suite == SuiteName.SERVE:
        made.append(_served(result, of_systems))
    elif result.suite in LINES:
        made.append(_curves(result, LINES[SuiteName(result.suite)], of_systems))
    elif result.suite == SuiteName.LATENCY:
        made.append(_values(result, [name for name in LATENCIES if _measured(result, name)][:1], of_systems, "median"))
    if not any(made):
        made.append(_otherwise(result, of_systems))
    ratios = [
        _speedups(result, metric, of_systems) for metric in dict.fromkeys(ratio.metric for ratio in result.ratios)
    ]
    # What a suite of comparisons is about comes first.
    made = ratios + made if result.suite == SuiteName.LATENCY else made + ratios
    return [drawing for drawing in made if drawing is not None]


def _speedups(result: SuiteResult, metric: str, of_systems: Mapping[str, int]) -> Drawing | None:
    ratios = [ratio for ratio in result.ratios if ratio.metric == metric]
    overs, unders = (list(dict.fromkeys(getattr(ratio, end) for ratio in ratios)) for end in ("over", "under"))
    words = label(metric).removesuffix(" (ms)").removesuffix(" (s)")
    most = {over: len({ratio.under for ratio in ratios if ratio.over == over}) for over in overs}
    simulated = tables.simulated(result.cells)
    baseline = max(overs, key=lambda over: most[over])
    if most[baseline] > 1 or len(overs) == 1:
        # What else was compared stands in the table.
        ratios = [ratio for ratio in ratios if ratio.over == baseline]
        title = f"Speed-up over {baseline}" if is_time(metric) else f"{baseline}, divided by each system"
        entries = {
            (ratio.over, ratio.under): bar_entry(ratio.under, of_systems[ratio.under], int(ratio.under in simulated))
            for ratio in ratios
        }
    elif len(unders) == 1:
        title = (
            f"Speed-up of {unders[0]} over each system" if is_time(metric) else f"Each system, divided by {unders[0]}"
        )
        entries = {(over, unders[0]): bar_entry(over, of_systems[over], int(over in simulated)) for over in overs}
    else:
        title = "Speed-up of the second over the first" if is_time(metric) else "The first divided by the second"
        pairs = dict.fromkeys((ratio.over, ratio.under) for ratio in ratios)
        entries = {
            (over, under): bar_entry(f"{over} ÷ {under}", of_systems[under], overs.index(over)) for over, under in pairs
        }
    title += f": {words}"

    def bar(ratio: Ratio) -> Bar:
        entry, value = entries[ratio.over, ratio.under], number(ratio.ratio)
        if value is None:
            return Bar(entry, None, tables.why_none(ratio))
        return Bar(entry, value, tables.times(value), number(ratio.low), number(ratio.high))

    panels = _panels(result, [(ratio.key, bar(ratio)) for ratio in ratios], title, f"{words}, ratio", reference=1.0)
    return Drawing(f"ratio-{metric}", title, tuple(entries.values()), panels)


def _values(result: SuiteResult, metrics: Sequence[str], of_systems: Mapping[str, int], name: str) -> Drawing | None:
    panels: list[Panel] = []
    for metric in metrics:
        scale, unit = _unit(metric, _values_of(result, [metric]))
        bars = [(cell.key, _value_bar(cell, metric, of_systems, scale)) for cell in result.cells]
        heading = _capital(label(metric))
        panels += _panels(result, bars, heading, label(metric) + unit, heading=heading if len(metrics) > 1 else "")
    if not panels:
        return None
    title = _capital(label(metrics[0])) if len(metrics) == 1 else "Figures by system"
    # Without axes, every bar has its name beside it.
    return Drawing(name, title, _legend(result, of_systems, bar_entry) if result.axes else (), tuple(panels))


def _value_bar(cell: Cell, metric: str, of_systems: Mapping[str, int], scale: float) -> Bar:
    hatch = int(cell.values.get("simulated") is True)
    entry, value = bar_entry(cell.system, of_systems[cell.system], hatch), number(cell.values.get(metric))
    if value is None:
        return Bar(entry, None, "no request completed" if tables.has_failed(cell) else "not measured")
    return Bar(entry, scale * value, short(metric, value))


def _panels(
    result: SuiteResult,
    bars: Sequence[tuple[Key, Bar]],
    title: str,
    words: str,
    *,
    heading: str = "",
    reference: float | None = None,
) -> tuple[Panel, ...]:
    """Bars grouped by the outermost axis, a panel for each combination of the others, all with one scale."""
    across = result.axes[:1]
    # Names speak for themselves; numbers do not.
    side = label(across[0]) if across and all(is_number(key.get(across[0])) for key, _bar in bars) else ""
    values = [bar.value for _key, bar in bars if bar.value is not None]
    most = max([*values, reference or 0.0, 0.0]) or 1.0
    ends = [bar.high for _key, bar in bars if bar.value is not None and bar.high is not None]
    # An interval may be much longer than its bar; it must not make all of them stubs.
    limit = min(max([most, *ends]), 2.5 * most) * 1.18
    panels = []
    for where, inside in _by(bars, result.axes[1:], named=True).items():
        groups = [(name, [bar for _key, bar in these]) for name, these in _by(inside, across).items()]
        if not across:
            groups = [(bar.entry.label, [bar]) for _name, group in groups for bar in group]
        count = sum(len(group) for _name, group in groups) + 0.6 * (len(groups) - 1)
        told = "; ".join(_told(name, group) for name, group in groups)
        panels.append(
            Panel(
                ", ".join(part for part in (heading, where) if part),
                f"{title}{f' ({where})' if where else ''}: {told}.",
                0.75 + 0.2 * max(count, 2),
                plots.bars(groups, limit, words, side, reference),
            )
        )
    return tuple(panels)


def _told(name: str, bars: Sequence[Bar]) -> str:
    parts = []
    for bar in bars:
        said = bar.says if name == bar.entry.label else f"{bar.entry.label} {bar.says}"
        if bar.low is not None and bar.high is not None:
            said += f" ({tables.times(bar.low)} to {tables.times(bar.high)})"
        parts.append(said)
    return f"{name}: {', '.join(parts)}" if name else ", ".join(parts)


def _curves(result: SuiteResult, lines: Lines, of_systems: Mapping[str, int]) -> Drawing | None:
    metrics = [name for name in lines.metrics if _measured(result, name)]
    metrics = metrics or [name for name in lines.instead if _measured(result, name)][:1]
    if lines.axis not in result.axes or not metrics:
        return None
    panels = [
        panel
        for metric in metrics
        for panel in _over(result, lines, metric, {"": metric}, of_systems, len(metrics) > 1)
    ]
    title = f"{' and '.join(label(name) for name in metrics)} over {label(lines.axis)}"
    return Drawing("curve", _capital(title), _legend(result, of_systems, line_entry), tuple(panels))


def _served(result: SuiteResult, of_systems: Mapping[str, int]) -> Drawing | None:
    axis = "request_rate"
    panels: list[Panel] = []
    for quantity in SERVED:
        names = [
            name for name in tables.scalars(result.cells) if statistic(name)[1] == quantity and _measured(result, name)
        ]
        drawn = {which: name for name in names if (which := statistic(name)[0]) == "median" or which.startswith("p")}
        if "median" in drawn:
            drawn.pop("p50", None)
        if drawn and axis in result.axes:
            ranked = dict(sorted(drawn.items(), key=lambda item: 50.0 if item[0] == "median" else float(item[0][1:])))
            panels += _over(result, Lines(axis, ()), quantity, ranked, of_systems, several=True)
    if not panels:
        return None
    return Drawing(
        "percentiles",
        "Percentiles of latency over the request rate",
        _legend(result, of_systems, line_entry),
        tuple(panels),
    )


def _over(
    result: SuiteResult,
    lines: Lines,
    metric: str,
    drawn: Mapping[str, str],
    of_systems: Mapping[str, int],
    several: bool,
) -> list[Panel]:
    """Lines for values, a panel for each combination of the other axes, all with one scale.

    Args:
        result: of a suite that has the axis.
        lines: over which axis, and how.
        metric: what the values are.
        drawn: the fields, by what their lines are called besides their system.
        of_systems: see `slots`.
        several: whether panels of other metrics stand beside these.
    """
    values = _values_of(result, drawn.values())
    scale, unit = _unit(metric, values)
    most = 104.0 if is_share(metric) else 1.08 * scale * max([*values, 0.0]) or 1.0
    words, over = label(metric), label(lines.axis)
    panels = []
    simulated = tables.simulated(result.cells)
    others = [axis for axis in result.axes if axis != lines.axis]
    for where, inside in _by([(cell.key, cell) for cell in result.cells], others, named=True).items():
        cells = [cell for _key, cell in inside]
        xs = _positions([cell.key.get(lines.axis) for cell in cells])
        curves, missing, told = [], [], []
        for system in dict.fromkeys(cell.system for cell in cells):
            first = int(system in simulated)
            entry = line_entry(system, of_systems[system], first)
            for place, (which, name) in enumerate(drawn.items(), first):
                points = []
                for cell in cells:
                    if cell.system != system:
                        continue
                    at = tables.at(cell.key, lines.axis)
                    if (value := number(cell.values.get(name))) is None:
                        missing.append(f"{system} at {at}")
                        continue
                    points.append((xs[_axis_value(cell.key.get(lines.axis))], scale * value))
                    told.append(f"{system}{f' {which}' if which else ''} {short(metric, value)} at {at}")
                style = STYLES[min(place, len(STYLES) - 1)]
                curves.append(Curve(entry, which, style, tuple(sorted(points))))
        gone = f"No value: {', '.join(dict.fromkeys(missing))}." if missing else ""
        draw = plots.lines(curves, xs, lines.axis, words + unit, most, doubling=lines.doubling, below=gone)
        alt = f"{words} over {over}{f' ({where})' if where else ''}: {', '.join(told) or 'nothing'}. {gone}"
        heading = ", ".join(part for part in (_capital(words) if several else "", where) if part)
        panels.append(Panel(heading, alt.strip(), LINES_IN, draw))
    return panels


def _stacked(result: SuiteResult, name: str) -> Drawing | None:
    cells = [cell for cell in result.cells if _ran(cell, name)]
    if not cells:
        return None
    legend = _stage_entries(tables.stages(cells, name))
    limit = max(sum(each for _stage, each in _ran(cell, name)) for cell in cells) * 1.14 or 1.0
    words = label(name)
    panels = []
    for where, inside in _by([(cell.key, cell) for cell in result.cells], result.axes).items():
        ran = [(cell.system, _ran(cell, name)) for _key, cell in inside]
        told = "; ".join(
            f"{system}: {', '.join(f'{stage} {short(name, each)}' for stage, each in parts) or 'not measured'}"
            for system, parts in ran
        )
        rows: list[Row] = [(system, [(legend[_family(stage)], each) for stage, each in parts]) for system, parts in ran]
        alt = f"{words}{f' ({where})' if where else ''}: {told}."
        panels.append(Panel(where, alt, 0.75 + 0.32 * max(len(rows), 1.5), plots.stacks(rows, limit, words)))
    return Drawing(name.replace("_", "-"), _capital(words), tuple(legend.values()), tuple(panels))


def _ran(cell: Cell, name: str) -> list[tuple[str, float]]:
    return [
        (stage, value) for stage, each in tables.table_of(cell, name).items() if (value := number(each)) is not None
    ]


def _family(stage: str) -> str:
    return re.sub(r"_\d+$", "", stage)


def _stage_entries(stages: Sequence[str]) -> dict[str, Entry]:
    """By family: ``step_1`` and ``step_2`` look the same, and the two that all pipelines have look the same in all reports."""
    free = itertools.count(len(FIRST_STAGES))
    return {
        name: stage_entry(name, FIRST_STAGES.index(name) if name in FIRST_STAGES else next(free))
        for name in dict.fromkeys(map(_family, stages))
    }


def _otherwise(result: SuiteResult, of_systems: Mapping[str, int]) -> Drawing | None:
    """Bars, or lines if there is an axis of numbers, for a suite that says nothing of how it is drawn."""
    metrics = [name for name in tables.headline(result) if name not in tables.COUNTS][:SHOWN_METRICS]
    numeric = [axis for axis in result.axes if any(is_number(cell.key.get(axis)) for cell in result.cells)]
    if not metrics:
        return None
    if result.suite not in BARS and numeric:
        lines = Lines(numeric[0], ())
        panels = [
            panel
            for metric in metrics
            for panel in _over(result, lines, metric, {"": metric}, of_systems, several=True)
        ]
        title = f"Figures over {label(lines.axis)}"
        return Drawing("curve", title, _legend(result, of_systems, line_entry), tuple(panels))
    return _values(result, metrics, of_systems, "bars")


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _unit(metric: str, values: Iterable[float]) -> tuple[float, str]:
    """What values are multiplied by to be drawn, and the words for it: per cent, or the unit of the largest."""
    if is_share(metric):
        return 100.0, " (%)"
    if not is_bytes(metric):
        return 1.0, ""
    largest = max(values, default=0.0)
    unit = format_bytes(largest).split()[1]
    return 1024.0 ** -("B", "KiB", "MiB", "GiB", "TiB").index(unit), f" ({unit})"


def _values_of(result: SuiteResult, names: Iterable[str]) -> list[float]:
    wanted = list(names)
    found = [number(cell.values.get(name)) for cell in result.cells for name in wanted]
    return [value for value in found if value is not None]


def _measured(result: SuiteResult, name: str) -> bool:
    return bool(_values_of(result, [name]))


def _by(items: Sequence[tuple[Key, T]], axes: Sequence[str], *, named: bool = False) -> dict[str, list[tuple[Key, T]]]:
    groups: dict[str, list[tuple[Key, T]]] = {}
    for key, item in items:
        groups.setdefault(tables.place(key, axes, named=named), []).append((key, item))
    return groups


def _legend(
    result: SuiteResult, of_systems: Mapping[str, int], entry: Callable[[str, int, int], Entry]
) -> tuple[Entry, ...]:
    """Systems that have cells; those that were only simulated are hatched, and their lines dashed."""
    present, simulated = {cell.system for cell in result.cells}, tables.simulated(result.cells)
    return tuple(
        entry(name, of_systems[name], int(name in simulated)) for name in tables.systems(result) if name in present
    )


def _axis_value(value: Any) -> Any:
    return float(value) if is_number(value) else str(value)


def _positions(values: Sequence[Any]) -> dict[Any, float]:
    """Where values lie on an axis: numbers at themselves; if there are words or inf among them, one beside the other."""
    unique = list(dict.fromkeys(_axis_value(value) for value in values))
    if all(isinstance(value, float) for value in unique):
        return {value: value for value in unique}
    ranked = sorted(value for value in unique if isinstance(value, float)) + [
        each for each in unique if isinstance(each, str)
    ]
    return {value: float(place) for place, value in enumerate(ranked)}
