"""How plots are drawn: bars, stacks and lines, as PNG for Markdown and as inline SVG that takes the page's colours."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telerag_cli.bench.tables import label, short
from telerag_cli.files import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_IN = 4.8
"""Of a panel: narrow enough for its words to be readable when a phone shows it alone."""
LINES_IN = 3.1
"""Height of a panel of lines."""
DPI = 144

# Light and dark, by the name that the page's style sheet gives them.
THEME = {
    "ink": ("#1c1f23", "#e7e8e5"),
    "muted": ("#59616a", "#a6adb5"),
    "rule": ("#d8dbd6", "#363c42"),
    "paper": ("#fdfdfb", "#15181b"),
}
SERIES = (
    ("#188ced", "#527cbd"),
    ("#d77915", "#f29b57"),
    ("#005e3d", "#00b481"),
    ("#6f297f", "#ec8dc2"),
    ("#8b4c00", "#e7a602"),
    ("#676c80", "#548382"),
    ("#009dcb", "#58e1fd"),
    ("#640000", "#c56051"),
    ("#102233", "#e7ffff"),
    ("#0145ba", "#6d90fb"),
    ("#ae857a", "#ffbbbc"),
)
"""Made to differ for everybody: at least 20 apart in CIELAB, with full sight and without red or green; 3:1 against the paper."""
STAGES = ("#77aadd", "#ee9a7a", "#ecdc8b", "#55bf9f", "#f5aebb", "#9fdcf7", "#c3ce52", "#c9b8ea", "#b7a98c", "#cfd4d8")
"""Light enough for dark words on them, in both modes."""
ON_STAGE = "#14171a"
MARKERS = (
    ("o", "●"),
    ("s", "■"),
    ("^", "▲"),
    ("D", "◆"),
    ("v", "▼"),
    ("P", "✚"),
    ("X", "✖"),
    ("*", "★"),
    ("<", "◀"),
    (">", "▶"),
    ("h", "⬢"),
)
"""What matplotlib calls them, and the same as text."""
HATCHES = ("", "//", "..", "xx")
"""For the second round through the colours, and so on."""

STYLES = ("-", (0, (4, 1.5)), (0, (1, 1.3)), (0, (5, 1.5, 1, 1.5)))
"""Of lines that share a colour."""

VARIABLES = {
    pair[0]: f"var(--{name})"
    for name, pair in (*THEME.items(), *((f"s{slot}", pair) for slot, pair in enumerate(SERIES)))
}
"""What a colour of a drawing is called in the page."""
INK, MUTED, RULE, PAPER = (THEME[name][0] for name in ("ink", "muted", "rule", "paper"))


@dataclass(frozen=True)
class Entry:
    """Of a legend: a system or a stage, and how it is drawn."""

    label: str
    css: str
    """The colour's name in the page's style sheet."""
    glyph: str
    colour: str
    marker: str = ""
    """Of a line; none for a bar."""
    hatch: str = ""
    style: Any = "-"
    """Of a line."""


@dataclass(frozen=True)
class Panel:
    """One set of axes, in words too."""

    title: str
    alt: str
    height_in: float
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Drawing:
    """One figure of a report: a legend over one or more panels."""

    name: str
    title: str
    legend: tuple[Entry, ...]
    panels: tuple[Panel, ...]

    @property
    def alt(self) -> str:
        """What it shows, for those who do not see it."""
        said = [panel.alt for panel in self.panels]
        return " ".join(said if said[0].lower().startswith(self.title.lower()) else [f"{self.title}.", *said])


@dataclass(frozen=True)
class Bar:
    """A value, or words in its place."""

    entry: Entry
    value: float | None
    says: str
    """At its end, or in its place."""
    low: float | None = None
    high: float | None = None
    """The ends of its confidence interval."""


Group = tuple[str, Sequence[Bar]]
"""What its bars have in common, and the bars."""
Row = tuple[str, Sequence[tuple[Entry, float]]]
"""A system, and its stages in the order in which they ran."""


@dataclass(frozen=True)
class Curve:
    """A line through points (x, y), ascending; ``which`` stands at its end."""

    entry: Entry
    which: str
    style: Any
    points: tuple[tuple[float, float], ...]


def bar_entry(name: str, slot: int, hatch: int = 0) -> Entry:
    """How a system's bars look.

    Args:
        name: in the legend.
        slot: the system's number.
        hatch: the first hatch, to tell apart bars of one system.
    """
    colour, pattern = slot % len(SERIES), HATCHES[(hatch + slot // len(SERIES)) % len(HATCHES)]
    return Entry(name, f"s{colour}", "■", SERIES[colour][0], hatch=pattern)


def line_entry(name: str, slot: int, style: int = 0) -> Entry:
    """How a system's lines look; see `bar_entry`.

    Args:
        name: in the legend.
        slot: the system's number.
        style: the first of its styles.
    """
    colour = slot % len(SERIES)
    marker, glyph = MARKERS[(slot + slot // len(SERIES)) % len(MARKERS)]
    return Entry(name, f"s{colour}", glyph, SERIES[colour][0], marker, style=STYLES[style])


def stage_entry(name: str, slot: int) -> Entry:
    """How a stage looks in a stack."""
    colour = slot % len(STAGES)
    return Entry(name, f"t{colour}", "■", STAGES[colour], hatch=HATCHES[slot // len(STAGES) % len(HATCHES)])


# How it is drawn.


def bars(
    groups: Sequence[Group], limit: float, words: str, side: str, reference: float | None
) -> Callable[[Axes], None]:
    """Horizontal bars in groups.

    Args:
        groups: from top to bottom.
        limit: where the horizontal axis ends.
        words: what it shows.
        side: what the groups are.
        reference: where a line goes through all of them.
    """

    def draw(axis: Axes) -> None:
        line, names, places = 0.0, [], []
        for name, bars in groups:
            places.append(line + (len(bars) - 1) / 2)
            names.append(_wrapped(name, 18, 3))
            for bar in bars:
                _bar(axis, bar, line, limit)
                line += 1
            line += 0.6
        axis.set_xlim(0, limit)
        axis.set_ylim(line - 0.6 - 0.35, -0.65)
        axis.set_yticks(places, names)
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=True, axis="x")
        axis.set_ylabel(_wrapped(side, 30, 2))
        if reference is not None:
            axis.axvline(reference, color=INK, linewidth=1, zorder=3)
        axis.xaxis.set_major_formatter(_tick)
        axis.locator_params(axis="x", nbins=6)
        axis.set_xlabel(_wrapped(words, 60, 2))

    return draw


def _bar(axis: Axes, bar: Bar, line: float, limit: float) -> None:
    colour, hatch = bar.entry.colour, bar.entry.hatch or None
    # Where there is no value, its foot alone says whose it would be.
    length = limit * 0.006 if bar.value is None else bar.value
    axis.barh(line, length, height=0.82, color=colour, hatch=hatch, edgecolor=PAPER, linewidth=0)
    box = {
        "boxstyle": "square,pad=0.1",
        "facecolor": PAPER,
        "edgecolor": "none",
    }  # or the line at 1 would cross the words
    if bar.value is None:
        axis.annotate(
            bar.says,
            (length, line),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            zorder=5,
            color=MUTED,
            style="italic",
            bbox=box,
        )
        return
    end = bar.value
    if bar.low is not None and bar.high is not None:
        for shade, width in ((PAPER, 2.6), (INK, 1.0)):
            axis.plot(
                [bar.low, bar.high],
                [line, line],
                color=shade,
                linewidth=width,
                marker="|",
                markersize=4 + width,
                markeredgewidth=width,
                solid_capstyle="butt",
                zorder=4,
            )
        end = max(end, min(bar.high, limit))
    axis.annotate(
        bar.says, (end, line), (4, 0), textcoords="offset points", va="center", fontsize=7.5, zorder=5, bbox=box
    )


def stacks(rows: Sequence[Row], limit: float, words: str) -> Callable[[Axes], None]:
    """Horizontal bars of stages one after the other; see `bars`."""

    def draw(axis: Axes) -> None:
        for line, (_system, parts) in enumerate(rows):
            start = 0.0
            for entry, part in parts:
                axis.barh(
                    line,
                    part,
                    left=start,
                    height=0.72,
                    color=entry.colour,
                    hatch=entry.hatch or None,
                    edgecolor=PAPER,
                    linewidth=0.7,
                )
                if part > limit * 0.016 * len(short("", part)):
                    axis.text(
                        start + part / 2,
                        line,
                        short("", part),
                        color=ON_STAGE,
                        fontsize=7,
                        ha="center",
                        va="center",
                        bbox={"boxstyle": "square,pad=0.1", "facecolor": entry.colour, "edgecolor": "none"},
                    )
                start += part
            style: dict[str, Any] = {"color": INK} if parts else {"style": "italic", "color": MUTED}
            axis.annotate(
                short("", start) if parts else "not measured",
                (start, line),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                **style,
            )
        axis.set_xlim(0, limit)
        axis.set_ylim(len(rows) - 0.45, -0.55)
        axis.set_yticks(range(len(rows)), [_wrapped(system, 18, 2) for system, _parts in rows])
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=True, axis="x")
        axis.xaxis.set_major_formatter(_tick)
        axis.locator_params(axis="x", nbins=6)
        axis.set_xlabel(_wrapped(words, 60, 2))

    return draw


def _tick(value: float, _place: float) -> str:
    return f"{value:,.10g}"


def lines(
    curves: Sequence[Curve],
    xs: Mapping[Any, float],
    axis_name: str,
    words: str,
    limit: float,
    *,
    doubling: bool = True,
    below: str = "",
) -> Callable[[Axes], None]:
    """Lines over an axis.

    Args:
        curves: the lines.
        xs: where the values of the axis lie on it.
        axis_name: a key of the cells.
        words: what the vertical axis shows.
        limit: where it ends; it begins at 0.
        doubling: whether the horizontal axis goes in powers of two, if it can.
        below: stands under the axis.
    """

    def draw(axis: Axes) -> None:
        for curve in curves:
            entry = curve.entry
            plain = curve.style == STYLES[0]
            axis.plot(
                [x for x, _y in curve.points],
                [y for _x, y in curve.points],
                color=entry.colour,
                linestyle=curve.style,
                marker=entry.marker,
                markersize=5 if plain else 3.5,
                linewidth=1.6 if plain else 1.2,
            )
            if curve.which and curve.points:
                axis.annotate(
                    curve.which,
                    curve.points[-1],
                    (5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                    color=MUTED,
                )
        _scale(axis, xs, axis_name, doubling)
        axis.set_ylim(0, limit)
        axis.grid(visible=True)
        axis.yaxis.set_major_formatter(_tick)
        axis.set_xlabel(_wrapped(label(axis_name), 60, 2) + (f"\n{_wrapped(below, 70, 4)}" if below else ""))
        axis.set_ylabel(_wrapped(words, 34, 2))

    return draw


def _scale(axis: Axes, xs: Mapping[Any, float], name: str, doubling: bool) -> None:
    """The horizontal axis, with what was measured as its ticks, as far as they have room."""
    places = sorted(xs.values())
    if not places:
        return
    words = any(isinstance(value, str) for value in xs)
    far: Callable[[float], float] = float
    if doubling and not words and places[0] > 0:
        far = math.log2
        axis.set_xscale("log", base=2)
        ends = (places[0] / 2**0.3, places[-1] * 2**0.3)
    else:
        room = (places[-1] - places[0]) * 0.06 or abs(places[0]) * 0.5 or 1.0
        ends = (places[0] - room, places[-1] + room)
    axis.set_xlim(*ends)
    names = {place: short(name, value) for value, place in xs.items()}
    whole = far(ends[1]) - far(ends[0])
    kept = [places[-1]]
    for place in reversed(places[:-1]):
        if far(kept[-1]) - far(place) >= whole * 0.0165 * (len(names[place]) + len(names[kept[-1]]) + 1):
            kept.append(place)
    if len(kept) == len(places) or words or far is math.log2:
        axis.set_xticks(kept, [names[place] for place in kept])
        axis.set_xticks([], minor=True)
    else:
        axis.xaxis.set_major_formatter(_tick)


def _wrapped(text: str, width: int, most: int) -> str:
    lines = textwrap.wrap(text, width, max_lines=most, placeholder=" …")
    return "\n".join(lines)


# Where it goes.


def save(drawing: Drawing, path: Path) -> None:
    """Draw it into a PNG: title, panels, legend.

    Raises:
        ResourceError: it cannot be written.
    """
    from matplotlib.figure import Figure

    count = len(drawing.panels)
    columns = 1 if count == 1 else 2 if count <= 4 else 3
    rows = -(-count // columns)
    heights = [
        max(panel.height_in for panel in drawing.panels[row * columns : (row + 1) * columns]) for row in range(rows)
    ]
    titled = any(panel.title for panel in drawing.panels)
    legend = [_wrapped(entry.label, 44, 2) for entry in drawing.legend]
    longest = max((len(line) for text in legend for line in text.split("\n")), default=1)
    across = max(1, min(len(legend), int(columns * WIDTH_IN * 12 / (longest + 6))))
    legend_in = 0.22 * -(-len(legend) // across) * max((text.count("\n") + 1 for text in legend), default=1) + 0.1
    heading = _wrapped(drawing.title, int(columns * WIDTH_IN * 10.5), 3)
    height = sum(heights) + (0.25 * rows if titled else 0) + legend_in + 0.2 * (heading.count("\n") + 1) + 0.1
    with _style(drawing.name):
        figure = Figure(figsize=(columns * WIDTH_IN, height), layout="constrained", facecolor=PAPER)
        grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
        for place, axis in enumerate(grid.flat):
            if place < count:
                _panel(axis, drawing.panels[place])
            else:
                axis.set_axis_off()
        figure.suptitle(heading, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        if legend:
            figure.legend(
                _handles(drawing), legend, loc="outside lower left", ncols=across, frameon=False, fontsize=8.5
            )
        with writing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)


def _handles(drawing: Drawing) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Line2D([], [], color=entry.colour, marker=entry.marker, markersize=5, linewidth=1.6, linestyle=entry.style)
        if entry.marker
        else Patch(facecolor=entry.colour, hatch=entry.hatch or None, edgecolor=PAPER, linewidth=0)
        for entry in drawing.legend
    ]


def svg(panel: Panel, identity: str) -> str:
    """Draw it as an element for a page: words as text, colours as the page's variables, the description as its title.

    Args:
        panel: what to draw.
        identity: unique in the page; names inside begin with it.
    """
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with _style(identity):
        figure = Figure(figsize=(WIDTH_IN, panel.height_in + (0.25 if panel.title else 0)), layout="constrained")
        _panel(figure.subplots(), panel)
        figure.savefig(buffer, format="svg", transparent=True)
    body = buffer.getvalue()
    body = re.sub(r"<metadata>.*?</metadata>", "", body[body.index("<svg") :], flags=re.DOTALL)
    start, rest = body.split(">", 1)
    found = re.search(r'viewBox="([^"]*)"', start)
    assert found is not None, "matplotlib's SVG has a view box"
    rest = re.sub("<[^>]*>", lambda tag: _own(tag[0], identity), rest)
    title = f'<title id="{identity}-title">{escape(panel.alt)}</title>'
    return f'<svg viewBox="{found[1]}" role="img" aria-labelledby="{identity}-title">{title}{rest}'


def _own(tag: str, identity: str) -> str:
    """A tag whose names are this drawing's, and whose colours are the page's."""
    tag = re.sub(r'\bid="', f'id="{identity}-', tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{identity}-', tag).replace("url(#", f"url(#{identity}-")
    return re.sub("#[0-9a-f]{6}", lambda colour: VARIABLES.get(colour[0], colour[0]), tag)


def _panel(axis: Axes, panel: Panel) -> None:
    panel.draw(axis)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    if panel.title:
        axis.set_title(_wrapped(panel.title, 56, 2), loc="left", fontsize=9, fontweight="bold")


def _style(identity: str) -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(
        {
            "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that plots are the same everywhere
            "font.size": 8.5,
            "text.color": INK,
            "text.parse_math": False,  # a dollar in a name is a dollar
            "axes.labelcolor": MUTED,
            "axes.labelsize": 8.5,
            "axes.edgecolor": MUTED,
            "axes.facecolor": "none",
            "axes.titlecolor": INK,
            "xtick.color": MUTED,
            "xtick.labelcolor": MUTED,
            "ytick.color": MUTED,
            "ytick.labelcolor": INK,
            "grid.color": RULE,
            "grid.linewidth": 0.7,
            "hatch.color": PAPER,
            "hatch.linewidth": 0.8,
            "svg.fonttype": "none",
            "svg.hashsalt": identity,
        }
    )
