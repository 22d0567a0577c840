"""The timeline under an answer: when the LLM wrote, when which list moved, and whether it was needed. Pure functions.

Only this request's own work is in it. What it shared with others, such as a batch of embeddings, is drawn as the time
it took.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from telerag_cli.engine.engine import AskResult
from telerag_cli.retrieval.report import JoinReport
from telerag_cli.retrieval.retriever import Retrieval
from telerag_cli.tracing import Span

MAX_LANES = 8
"""Lanes of a kind. Where more bars than that overlap, one is drawn over others, in the lane that is free soonest."""
MAX_BARS = 2000
"""Bars of a kind. If there are more, those that begin in the same `SLICES`-th of the time and say the same merge."""
SLICES = 500
COUNTS = (
    "lists_hit",
    "lists_wanted",
    "lists_coming",
    "lists_moved",
    "lists_wasted",
    "lists_missed",
    "lists_in_place",
    "bytes_moved",
    "bytes_missed",
)
FIGURES = ("prompt_tokens", "cached_tokens", "completion_tokens", "queue_s", "prefill_s", "decode_s")
"""What a bar says of an LLM call."""
_NAMES = {"llm": "LLM", "link": "link", "scoring": "scoring", "embedding": "embedding"}


@dataclass(frozen=True)
class _TimelineBar:
    """One bar, from ``start_s`` to ``end_s`` on any clock."""

    start_s: float
    end_s: float
    says: str
    """The stage, what became of a list, or what was done to lists."""
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        lists = self.figures.get("lists")
        if lists is None:
            return self.says
        count = "1 list" if lists == 1 else f"{lists:,} lists"
        if "list" not in self.figures:
            return self.says.format(count)
        return f"list {self.figures['list']}" if lists == 1 else count


class _Axis:
    """Seconds from the beginning, within the request, to a microsecond."""

    def __init__(self, began_s: float, ended_s: float) -> None:
        self._began_s = began_s
        self.total_s = round(max(ended_s - began_s, 0.0), 6)

    def at(self, moment_s: float) -> float:
        return round(min(max(moment_s - self._began_s, 0.0), self.total_s), 6)


class _Link:
    """The link's own time, from the spans of everybody's moves.

    A move is recorded from when it was asked for. It has been on its way at most since the one before it ended in the
    same lane, as a lane moves in turn; moves that end there at the same moment went together.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self._moves: defaultdict[int, list[_TimelineBar]] = defaultdict(list)
        ends_s: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (float("-inf"), float("-inf")))
        for span in sorted((span for span in spans if "list" in span.details), key=lambda span: span.end_s):
            before_s, last_s = ends_s[span.lane]
            if span.end_s > last_s:
                before_s, last_s = last_s, span.end_s
            ends_s[span.lane] = before_s, last_s
            number = span.details["list"]
            figures = {"list": number, "lists": 1, "bytes": span.details["bytes"]}
            self._moves[number].append(_TimelineBar(max(span.start_s, before_s), span.end_s, "", figures))

    def last(self, number: int, outcome: str, before_s: float, since_s: float = float("-inf")) -> _TimelineBar | None:
        """The last move of a list that ended between these times, if it was seen."""
        moves = self._moves[number]
        place = bisect_right(moves, before_s, key=lambda move: move.end_s)
        if not place or moves[place - 1].end_s < since_s:
            return None
        move = moves[place - 1]
        return _TimelineBar(move.start_s, move.end_s, outcome, move.figures | {"outcome": outcome})


def timeline(answered: AskResult, spans: Sequence[Span], began_s: float, ended_s: float) -> dict[str, Any]:
    """Return the timeline of one answered request, as JSON.

    The bars of the link need the spans of its moves, so listen to the tracer since before ``began_s``, which is 0 on
    the axis. Without them all else is there, and ``counts.lists_undrawn`` says how many moves are not. A link's bar of
    several lists names the first; one that is ``wasted`` was not probed by the retrieval it was moved for.
    """
    axis = _Axis(began_s, ended_s)
    moves = list(_moves(answered.joins, _Link(spans)))
    bars = {
        "llm": list(_written(answered)),
        "link": _thinned(_gathered(filter(None, moves)), axis),
        "scoring": _thinned([bar for join in answered.joins for bar in _scored(join)], axis),
        "embedding": list(_embedded(answered.retrievals)),
    }
    counts = {name: sum(getattr(join, name) for join in answered.joins) for name in COUNTS}
    return {
        "total_s": axis.total_s,
        "lanes": [lane for kind, of_kind in bars.items() for lane in _lanes(kind, of_kind, axis)],
        "marks": sorted(_marks(answered.retrievals, axis), key=lambda mark: mark["at_s"]),
        "counts": counts | {"lists_undrawn": moves.count(None)},
    }


def _written(answered: AskResult) -> Iterator[_TimelineBar]:
    for stage in answered.stages:
        figures = {name: round(getattr(stage.generation, name), 6) for name in FIGURES}
        yield _TimelineBar(stage.began_s, stage.began_s + stage.took_s, stage.name, {"stage": stage.name, **figures})


def _moves(joins: Iterable[JoinReport], link: _Link) -> Iterator[_TimelineBar | None]:
    """What was moved ahead for these retrievals and by them; None for a move that was not seen."""
    for trace in (join.trace for join in joins if join.trace):
        wanted = set(trace.wanted.tolist())
        for number, at_s in zip(trace.moved.tolist(), trace.moved_s.tolist(), strict=True):
            yield link.last(number, "hit" if number in wanted else "wasted", at_s)
        for number in trace.fetched.tolist():
            yield link.last(number, "missed", trace.ended_s, trace.arrived_s)


def _scored(join: JoinReport) -> Iterator[_TimelineBar]:
    trace = join.trace
    if trace is None:
        return
    yield _TimelineBar(trace.arrived_s, trace.arrived_s + join.coarse_s, "find lists")
    for (start_s, end_s), lists, in_place in zip(
        trace.scored_s.tolist(), trace.scored.tolist(), trace.scored_in_place.tolist(), strict=True
    ):
        yield _TimelineBar(start_s, end_s, "score {} in place" if in_place else "score {}", {"lists": lists})
    if trace.again_s:
        yield _TimelineBar(trace.ended_s - trace.again_s, trace.ended_s, "score again")


def _embedded(retrievals: Iterable[Retrieval]) -> Iterator[_TimelineBar]:
    for retrieval in retrievals:
        if trace := retrieval.join.trace:
            # A retrieval embeds right before it searches.
            start_s = trace.arrived_s - retrieval.embed_s
            count = len(retrieval.queries)
            yield _TimelineBar(start_s, trace.arrived_s, "embed the query" if count == 1 else f"embed {count} queries")


def _marks(retrievals: Sequence[Retrieval], axis: _Axis) -> Iterator[dict[str, Any]]:
    def mark(moment_s: float, kind: str, label: str) -> dict[str, Any]:
        return {"at_s": axis.at(moment_s), "kind": kind, "label": label}

    for number, retrieval in enumerate(retrievals, 1):
        trace = retrieval.join.trace
        if trace is None:
            continue
        which = f" {number}" if len(retrievals) > 1 else ""
        for order in trace.orders:
            if order.fraction:
                yield mark(order.at_s, "refinement", f"{100 * order.fraction:.0f} % of the text")
            else:
                yield mark(order.at_s, "lookahead", f"lookahead{which} begins")
        asked = "query arrives" if len(retrieval.queries) == 1 else f"{len(retrieval.queries)} queries arrive"
        yield mark(trace.arrived_s, "query", f"retrieval{which}: {asked}" if which else asked)


def _gathered(moves: Iterable[_TimelineBar]) -> list[_TimelineBar]:
    """Moves of one outcome that began and ended together, as one: a link may copy and report many lists at a time."""
    together: defaultdict[tuple[str, float, float], list[_TimelineBar]] = defaultdict(list)
    for bar in moves:
        together[bar.says, bar.start_s, bar.end_s].append(bar)
    return list(map(_merged, together.values()))


def _thinned(bars: Sequence[_TimelineBar], axis: _Axis) -> list[_TimelineBar]:
    """At most `MAX_BARS`, as there are at most four things to say of lists in each slice of the time."""
    if len(bars) <= MAX_BARS:
        return list(bars)
    near: defaultdict[tuple[str, int], list[_TimelineBar]] = defaultdict(list)
    for bar in bars:
        slice_no = min(int(axis.at(bar.start_s) / max(axis.total_s, 1e-9) * SLICES), SLICES - 1)
        near[bar.says, slice_no].append(bar)
    return list(map(_merged, near.values()))


def _merged(bars: Sequence[_TimelineBar]) -> _TimelineBar:
    """Bars that say the same as one: of all their lists and bytes, named after the first."""
    first = min(bars, key=lambda bar: bar.start_s)
    sums = {name: sum(bar.figures[name] for bar in bars) for name in ("lists", "bytes") if name in first.figures}
    return _TimelineBar(first.start_s, max(bar.end_s for bar in bars), first.says, first.figures | sums)


def _lanes(kind: str, bars: Iterable[_TimelineBar], axis: _Axis) -> list[dict[str, Any]]:
    """The bars in as many lanes as overlap."""
    lanes: list[list[_TimelineBar]] = []
    ends_s: list[float] = []
    for bar in sorted(bars, key=lambda bar: (bar.start_s, bar.end_s)):
        free = next((lane for lane, end_s in enumerate(ends_s) if end_s <= bar.start_s), None)
        if free is None and len(lanes) < MAX_LANES:
            free = len(lanes)
            lanes.append([])
            ends_s.append(bar.end_s)
        elif free is None:
            free = ends_s.index(min(ends_s))
        lanes[free].append(bar)
        ends_s[free] = max(ends_s[free], bar.end_s)
    return [
        {
            "name": _NAMES[kind] if number == 1 else f"{_NAMES[kind]} {number}",
            "kind": kind,
            "bars": [
                {"start_s": axis.at(bar.start_s), "end_s": axis.at(bar.end_s), "label": bar.label, **bar.figures}
                for bar in lane
            ],
        }
        for number, lane in enumerate(lanes, 1)
    ]
