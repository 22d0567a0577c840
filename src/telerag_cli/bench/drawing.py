"""A plot as matplotlib draws it into a file: panels over one legend, in the report's own style."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telerag_cli.errors import needs_extra
from telerag_cli.files import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_IN = 4.8
"""Width of a panel."""
DPI = 144
INK, MUTED, RULE, PAPER = "#1c1f23", "#59616a", "#d8dbd6", "#fdfdfb"


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
    legend: Mapping[str, tuple[str, str]]
    """Colour and marker of each entry."""
    panels: Sequence[Panel]
    is_lines: bool = False

    @property
    def description(self) -> str:
        """What the plot shows, for readers who do not see it."""
        return " ".join([f"{self.title}.", *(panel.description for panel in self.panels)])

    def save(self, path: Path) -> None:
        """Draw the plot into a PNG.

        Raises:
            ResourceError: matplotlib is missing, or the file cannot be written.
        """
        with needs_extra("bench", "A report"):
            import matplotlib
            from matplotlib.figure import Figure
            from matplotlib.lines import Line2D

        count = len(self.panels)
        columns = min(count, 2 if count <= 4 else 3)
        rows = -(-count // columns)
        starts = range(0, count, columns)
        heights = [max(panel.height_in for panel in self.panels[start : start + columns]) for start in starts]
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
                axis.set_title(wrapped(panel.title, 56), loc="left", fontsize=9, fontweight="bold")
            heading = wrapped(self.title, int(columns * PANEL_IN * 10.5))
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


def wrapped(text: str, width: int) -> str:
    """Return text in at most three lines of a width."""
    return "\n".join(textwrap.wrap(text, width, max_lines=3, placeholder=" …"))


def tick(value: float, _place: float) -> str:
    """Return the label of a tick."""
    return f"{value:,.10g}"
