"""Three plots of a profile: what the link carries, what a query costs, and what lookahead can hide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from telerag_cli.errors import UsageError, needs_extra
from telerag_cli.files import writing
from telerag_cli.planning import formulas
from telerag_cli.planning.links import slot_bytes_per_s
from telerag_cli.planning.planner import Planner
from telerag_cli.planning.profile import Profile
from telerag_cli.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg", "pdf")
COLOURS = ("#1f5fa8", "#c8551b", "#3a8f4d", "#7a4fa0", "#8a6d1d", "#4d4d4d")


def plot(profile: Profile, planner: Planner | None, window_s: float, path: Path) -> None:
    """Draw the plots side by side into one file.

    Without a planner, and so without an index, only the link is drawn. ``window_s`` is a window to mark.

    Raises:
        ResourceError: matplotlib is not installed.
        UsageError: the format is unknown.
    """
    kind = check_format(path)
    with needs_extra("bench", "A plot"):
        import matplotlib
        from matplotlib import pyplot

    matplotlib.use("Agg")
    count = 1 if planner is None else 3
    figure, axes = pyplot.subplots(1, count, figsize=(6.4 * count, 5.2), layout="constrained", squeeze=False)
    try:
        _draw_links(axes[0][0], profile)
        if planner is not None:
            _draw_times(axes[0][1], profile, planner, window_s)
            _draw_hits(axes[0][2], profile, planner, window_s)
        for axis in axes[0]:
            axis.grid(visible=True, which="major", color="#dddddd", linewidth=0.7)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        identity = profile.identity
        gpus = f", {', '.join(identity.gpus)}" if identity.gpus else ""
        machine = f"{identity.cpu}, {identity.cores} cores{gpus}"
        title = f"{machine}; {identity.tier} tier; {identity.index}; LLM {identity.model}"
        figure.suptitle(title, fontsize=9, color="#555555", x=0.01, ha="left")
        with writing(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=130)
    finally:
        pyplot.close(figure)


def check_format(path: Path) -> str:
    """Return the format that a file's suffix names.

    Raises:
        UsageError: it names none that can be drawn.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise UsageError(
            f"{path} ends in '{path.suffix}', and plots are {', '.join(FORMATS)}.", remedy="Name it like profile.png."
        )
    return kind


def _mark(axis: Axes, place: float, words: str, height: float = 0.02, style: str = ":") -> None:
    """Draw a labelled vertical line, its label on the side that has room; the axes have their limits and scale."""
    axis.axvline(place, color="#999999", linestyle=style, linewidth=1.2)
    right = axis.transAxes.inverted().transform(axis.transData.transform((place, 1.0)))[0] > 0.6
    axis.annotate(
        f"{words} " if right else f" {words}",
        (place, height),
        xycoords=("data", "axes fraction"),
        color="#666666",
        fontsize=9,
        horizontalalignment="right" if right else "left",
    )


def _finish(axis: Axes, title: str, x: str, y: str, legend: Literal["best", "lower right"] = "best") -> None:
    axis.set(xlabel=x, ylabel=y)
    axis.set_title(title, loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=8, loc=legend)


def _draw_links(axis: Axes, profile: Profile) -> None:
    for number, (link, way) in enumerate(dict.fromkeys((point.link, point.way) for point in profile.links)):
        these = sorted(
            (point for point in profile.links if (point.link, point.way) == (link, way)), key=lambda point: point.depth
        )
        deepest = {point.nbytes: point for point in these}  # the last of each size
        sizes, rates = sorted(deepest), [deepest[nbytes].bytes_per_s for nbytes in sorted(deepest)]
        low, middle, high = ([getattr(rate, name) / 1e9 for rate in rates] for name in ("low", "value", "high"))
        label, colour = f"{link}, {way}, up to {these[-1].depth} in flight", COLOURS[number % len(COLOURS)]
        axis.plot(sizes, middle, marker="o", markersize=4, color=colour, label=label)
        axis.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
    slot = profile.pcie
    if slot is not None and (most := slot_bytes_per_s(slot)) is not None:
        axis.axhline(most / 1e9, color="#999999", linestyle="--", linewidth=1)
        name = f"PCIe {slot.generation} x{slot.width}"
        axis.annotate(name, (0.01, most / 1e9), xycoords=("axes fraction", "data"), va="bottom")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _place: format_bytes(value).replace(".00", "").replace(".0 ", " "))
    axis.set_ylim(bottom=0)
    if profile.index is not None:
        _mark(axis, profile.index.mean_list_bytes, "the mean list")
    _finish(axis, "Larger transfers use more of the link", "size of a transfer", "bandwidth (GB/s)")


def _draw_times(axis: Axes, profile: Profile, planner: Planner, window_s: float) -> None:
    index, moving, joins = profile.index, profile.moving, profile.joins
    assert index is not None
    assert moving is not None
    assert joins is not None
    counts = np.unique(np.geomspace(1, index.nlist, 60).astype(int))
    nbytes = [formulas.probed_bytes(index, int(count)) for count in counts]
    in_place, even = planner.scoring("in place"), planner.break_even_bytes()

    def line(seconds: list[float], label: str, colour: str, **style: Any) -> None:
        axis.plot(counts, [1e3 * each for each in seconds], color=colour, label=label, **style)

    misses = [planner.join_s(0.0, each) for each in nbytes]
    if in_place is None:
        line(misses, "all moved when the query arrives", COLOURS[1])
    else:
        rate = moving.alone.value
        moved = [joins.fixed_s + each / rate for each in nbytes]
        line(moved, "all moved when the query arrives", COLOURS[1])
        scored = [joins.fixed_s + formulas.score_s(in_place, each) for each in nbytes]
        line(scored, "all scored in place", COLOURS[3])
        line(misses, "both, as the planner splits them", COLOURS[2], linestyle="--")
    line([planner.join_s(each, 0.0) for each in nbytes], "all in fast memory already", COLOURS[0])
    budget = formulas.budget_bytes(planner.link_bytes_per_s(""), window_s, planner.most_bytes)
    hidden = formulas.hidden_nprobe(index, budget)
    marks = [(hidden, f"a window of {window_s:.2g} s\nmoves {hidden:,} lists")]
    title = f"Lookahead can hide up to {hidden:,} lists"
    if even is not None:
        place = formulas.hidden_nprobe(index, even) if np.isfinite(even) else 0
        title = "Scoring in place is faster than moving, for one query"
        if 0 < place < index.nlist:
            title = f"Moving is as fast as scoring in place from {place:,} lists on"
            marks.append((place, "break-even"))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _place: f"{value:,.0f}")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _place: f"{value:,g}")
    # On a short axis, the powers of ten alone would be too few.
    axis.yaxis.set_minor_formatter(lambda value, _place: f"{value:,g}" if f"{value:e}"[0] in "25" else "")
    for place, words in marks:
        if 0 < place < index.nlist:
            _mark(axis, place, words)
    _finish(axis, title, "lists probed (nprobe)", "retrieval of one query (ms)")


def _draw_hits(axis: Axes, profile: Profile, planner: Planner, window_s: float) -> None:
    assert profile.index is not None
    probed = planner.probed_bytes
    names = {"question": "by the question alone", "refined": "refined by the text"}
    for number, curve in enumerate(profile.index.hit_curves):
        axis.plot(
            [0.0, *(point.budget * probed / 1e6 for point in curve.points)],
            [0.0, *(100 * point.hit for point in curve.points)],
            marker="o",
            markersize=3,
            color=COLOURS[1 - number],
            label=f"lookahead {names.get(curve.lookahead, curve.lookahead)}",
        )
    budget = formulas.budget_bytes(planner.link_bytes_per_s(""), window_s, planner.most_bytes)
    hit_share = planner.outlook(window_s, "refined").hit_share
    most = max(point.budget for point in profile.index.hit_curves[0].points) * probed / 1e6
    axis.set_ylim(0, 105)
    axis.set_xlim(0, most)
    _mark(axis, probed / 1e6, "all that is probed", style="--")
    if budget / 1e6 <= most:
        _mark(axis, budget / 1e6, f"a window of {window_s:.2g} s", height=0.3)
    x, y = f"budget (MB), nprobe {planner.nprobe:,}", "probed bytes in fast memory (%)"
    _finish(axis, f"A window of {window_s:.2g} s gets {hit_share:.0%} there in time", x, y, "lower right")
