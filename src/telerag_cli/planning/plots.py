"""Three plots of a profile: what the link carries, what a query costs, and what lookahead can hide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from telerag_cli.config import format_bytes
from telerag_cli.errors import UsageError, needs_extra
from telerag_cli.files import writing
from telerag_cli.planning import formulas
from telerag_cli.planning.planner import Planner
from telerag_cli.planning.profile import LinkPoint, Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg", "pdf")
COLOURS = ("#1f5fa8", "#c8551b", "#3a8f4d", "#7a4fa0", "#8a6d1d", "#4d4d4d")


def plot(profile: Profile, planner: Planner | None, window_s: float, path: Path) -> None:
    """Draw them side by side into one file.

    Args:
        profile: what was measured.
        planner: over it; without an index only the link is drawn.
        window_s: a window to mark.
        path: its ending says the format.

    Raises:
        UsageError: the format is unknown.
    """
    kind = check_format(path)
    with needs_extra("bench", "A plot"):
        import matplotlib
        from matplotlib import pyplot

    matplotlib.use("Agg")

    drawings = [_draw_links] if planner is None else [_draw_links, _draw_times, _draw_hits]
    figure, axes = pyplot.subplots(
        1, len(drawings), figsize=(6.4 * len(drawings), 5.2), layout="constrained", squeeze=False
    )
    try:
        for draw, axis in zip(drawings, axes[0], strict=True):
            draw(axis, profile, planner, window_s)
            axis.grid(visible=True, which="major", color="#dddddd", linewidth=0.7)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(_of(profile), fontsize=9, color="#555555", x=0.01, ha="left")
        with writing(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=130)
    finally:
        pyplot.close(figure)


def check_format(path: Path) -> str:
    """The format that a file's ending names.

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
    """A vertical line and what it is, on the side where there is room; for axes that have their limits and scale."""
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


def _of(profile: Profile) -> str:
    identity = profile.identity
    gpus = f", {', '.join(identity.gpus)}" if identity.gpus else ""
    return f"{identity.cpu}, {identity.cores} cores{gpus}; {identity.tier} tier; {identity.index}; LLM {identity.model}"


def _draw_links(axis: Axes, profile: Profile, _planner: Planner | None, _window_s: float) -> None:
    for number, (link, way) in enumerate(dict.fromkeys((point.link, point.way) for point in profile.links)):
        these = sorted(
            (point for point in profile.links if (point.link, point.way) == (link, way)), key=lambda point: point.depth
        )
        deepest = {point.nbytes: point for point in these}  # the last of each size
        points = [deepest[nbytes] for nbytes in sorted(deepest)]
        depth = max(point.depth for point in points)
        _line(axis, points, f"{link}, {way}, up to {depth} under way", COLOURS[number % len(COLOURS)])
    slot = profile.pcie
    if slot is not None:
        from telerag_cli.planning.pcie import slot_bytes_per_s

        if (most := slot_bytes_per_s(slot)) is not None:
            axis.axhline(most / 1e9, color="#999999", linestyle="--", linewidth=1)
            name = f"PCIe {slot.generation} x{slot.width}"
            axis.annotate(name, (0.01, most / 1e9), xycoords=("axes fraction", "data"), va="bottom")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _place: format_bytes(value).replace(".00", "").replace(".0 ", " "))
    axis.set_ylim(bottom=0)
    if profile.index is not None:
        _mark(axis, profile.index.mean_list_bytes, "the mean list")
    axis.set(xlabel="size of a transfer", ylabel="bandwidth (GB/s)")
    axis.set_title("Larger transfers use more of the link", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=8)


def _line(axis: Axes, points: list[LinkPoint], label: str, colour: str) -> None:
    sizes = [point.nbytes for point in points]
    middle = [point.bytes_per_s.value / 1e9 for point in points]
    axis.plot(sizes, middle, marker="o", markersize=4, color=colour, label=label)
    axis.fill_between(
        sizes,
        [point.bytes_per_s.low / 1e9 for point in points],
        [point.bytes_per_s.high / 1e9 for point in points],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )


def _draw_times(axis: Axes, profile: Profile, planner: Planner | None, window_s: float) -> None:
    assert planner is not None
    assert profile.index is not None
    assert profile.moving is not None
    counts = np.unique(np.geomspace(1, profile.index.nlist, 60).astype(int))
    joins, in_place, even = profile.joins, planner.scoring("in place"), planner.break_even_bytes()
    assert joins is not None
    nbytes = [formulas.probed_bytes(profile.index, int(count)) for count in counts]

    def line(seconds: list[float], label: str, colour: str, **style: Any) -> None:
        axis.plot(counts, [1e3 * each for each in seconds], color=colour, label=label, **style)

    none_there = [planner.join_s(0.0, each) for each in nbytes]
    if in_place is None:
        line(none_there, "all moved when the query is there", COLOURS[1])
    else:
        rate = formulas.link_bytes_per_s(profile.moving, decoding=False)
        moved = [joins.fixed_s + formulas.move_s(rate, each) for each in nbytes]
        line(moved, "all moved when the query is there", COLOURS[1])
        scored = [joins.fixed_s + formulas.score_s(in_place, each) for each in nbytes]
        line(scored, "all scored in place", COLOURS[3])
        line(none_there, "both, as the planner splits them", COLOURS[2], linestyle="--")
    line([planner.join_s(each, 0.0) for each in nbytes], "all in fast memory already", COLOURS[0])
    budget = formulas.budget_bytes(planner.link_bytes_per_s(""), window_s, planner.most_bytes)
    hidden = formulas.hidden_nprobe(profile.index, budget)
    marks = [(hidden, f"a window of {window_s:.2g} s\nmoves {hidden:,} lists")]
    title = f"Lookahead can hide up to {hidden:,} lists"
    if even is not None:
        place = formulas.hidden_nprobe(profile.index, even) if np.isfinite(even) else 0
        title = "Scoring in place is quicker than moving, for one query"
        if 0 < place < profile.index.nlist:
            title = f"Moving is as quick as scoring in place from {place:,} lists on"
            marks.append((place, "break-even"))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _place: f"{value:,.0f}")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _place: f"{value:,g}")
    # On a short axis, the powers of ten alone would be too few.
    axis.yaxis.set_minor_formatter(lambda value, _place: f"{value:,g}" if f"{value:e}"[0] in "25" else "")
    for place, words in marks:
        if 0 < place < profile.index.nlist:
            _mark(axis, place, words)
    axis.set(xlabel="lists probed (nprobe)", ylabel="retrieval of one query (ms)")
    axis.set_title(title, loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=8)


def _draw_hits(axis: Axes, profile: Profile, planner: Planner | None, window_s: float) -> None:
    assert planner is not None
    assert profile.index is not None
    probed = planner.probed_bytes
    names = {"question": "by the question alone", "refined": "refined by the text"}
    for number, curve in enumerate(profile.index.hit_curves):
        budgets = [0.0, *(point.budget * probed / 1e6 for point in curve.points)]
        axis.plot(
            budgets,
            [0.0, *(100 * point.hit for point in curve.points)],
            marker="o",
            markersize=3,
            color=COLOURS[1 - number],
            label=f"lookahead {names.get(curve.lookahead, curve.lookahead)}",
        )
    budget = formulas.budget_bytes(planner.link_bytes_per_s(""), window_s, planner.most_bytes)
    expected = planner.outlook(window_s, "refined")
    most = max(point.budget for point in profile.index.hit_curves[0].points) * probed / 1e6
    axis.set_ylim(0, 105)
    axis.set_xlim(0, most)
    _mark(axis, probed / 1e6, "all that is probed", style="--")
    if budget / 1e6 <= most:
        _mark(axis, budget / 1e6, f"a window of {window_s:.2g} s", height=0.3)
    axis.set(xlabel=f"budget (MB), nprobe {planner.nprobe:,}", ylabel="probed bytes in fast memory (%)")
    axis.set_title(
        f"A window of {window_s:.2g} s lets {expected.hit_share:.0%} be there in time", loc="left", fontsize=11
    )
    axis.legend(frameon=False, fontsize=8, loc="lower right")
